"""The benchmarks' own logic, on a CPU: what they time there means nothing, what they write does."""

import json
from functools import partial

import attention
import common
import decode
import experts
import finetune
import generate
import jax
import jax.numpy as jnp
import key_blocks
import lowering
import methods
import numpy as np
import packed
import pytest
import quality
import sparse_quality
import tune_attention

from dca_jax.config import LlamaConfig
from dca_jax.errors import InputError

pytestmark = pytest.mark.benchmarks
SHARES = 0.1, 0.05, 0.2


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for name in ("WARM_UP", "BLOCK", "LONG"):
        monkeypatch.setattr(common, name, 1e-3)
    monkeypatch.setattr(common, "BLOCKS", 2)


def test_times_are_milliseconds_a_call():
    calls = []

    def function(x):
        calls.append(x)
        return x

    time = common.timed(function, jnp.ones(3))
    assert 0 < time.low <= time.median <= time.high < 1e3
    assert len(calls) > 3


def test_numbers():
    assert common.numbers("4k, 100,1k") == [4096, 100, 1024]
    for text in ("", "4k,", "k", "-1", "4.5k"):
        with pytest.raises(InputError, match="expected numbers"):
            common.numbers(text)


def test_report_is_whole_after_every_row_and_files_are_merged(tmp_path):
    first, second = tmp_path / "first.json", tmp_path / "new" / "second.json"
    report = common.Report(first, {"device": "X"})
    report.add({"tokens": 1, "ms": 1.0})
    report.add({"tokens": 2, "ms": 2.0})
    assert json.loads(first.read_text())["rows"][1] == {"tokens": 2, "ms": 2.0}
    common.Report(second, {"device": "X"}).add({"tokens": 2, "failed": "why"})
    facts, rows = common.merged([first, second], ["tokens"])
    assert facts == {"device": "X"}
    assert rows == [{"tokens": 1, "ms": 1.0}, {"tokens": 2, "failed": "why"}]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first.json", "new"]

    common.Report(second, {"device": "Y"}).add({"tokens": 2})
    with pytest.raises(InputError, match="measured on Y"):
        common.merged([first, second], ["tokens"])
    second.write_text("[]")
    with pytest.raises(InputError, match="no result"):
        common.merged([second], ["tokens"])


def test_attention_rows_and_their_picture(tmp_path, monkeypatch, capsys):
    def failing(*arrays):
        raise MemoryError("too small\nand more")

    monkeypatch.setattr(attention, "on_gpu", lambda: True)
    monkeypatch.setattr(attention, "cudnn", lambda query, key, value, cos, sin: query)
    monkeypatch.setattr(attention, "BACKENDS", {"xla": attention.BACKENDS["xla"]})
    monkeypatch.setattr(attention, "mosaic_example", failing)
    out, picture = tmp_path / "attention.json", tmp_path / "attention.svg"
    attention.measure(out, lengths="64", heads="2/1", head_dim=16, variants="passes,example")
    rows = json.loads(out.read_text())["rows"]
    names = [row["variant"] for row in rows if row["pass"] == "forward"]
    assert names[:2] == ["cuDNN + rope", "xla: DCA, three passes"]
    assert names[-1] == "cuDNN + rope, again"
    assert {row["pass"] for row in rows} == set(attention.PASSES)
    for row in rows:
        if "example" in row["variant"]:
            assert row["failed"] == "MemoryError: too small"
        else:
            assert row["ms"] > 0
            assert row["speed"] > 0
    attention.plot([out], picture, head_dim=16)
    assert "</svg>" in picture.read_text()
    assert "three passes" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        attention.plot([out], picture, head_dim=128)


def test_the_picture_has_no_empty_panel_and_names_every_length():
    names = {"head_dim": 128, "variant": "mosaic_gpu: DCA", "speed": 1.1}
    forward = [
        names | {"heads": heads, "pass": "forward", "tokens": tokens}
        for heads in ("32/32", "32/8")
        for tokens in (4096, 8192, 131072)
    ]
    both = names | {"heads": "32/8", "pass": "forward + backward", "tokens": 8192}
    figure = attention.draw([*forward, both], "H200")
    panels = [axes.get_title() for axes in figure.axes]
    assert panels == [
        "forward, 32 query and 32 kv heads",
        "forward, 32 query and 8 kv heads",
        "forward + backward, 32 query and 8 kv heads",
    ]
    for axes in figure.axes:
        assert [label.get_text() for label in axes.get_xticklabels()] == ["4k", "8k", "128k"]


def test_peers_rotation_is_the_models():
    """The tables that the peers are given rotate as `dca_jax.rope` does: the same attention."""
    shape = (1, 24, 2, 16)
    query, key, value = (jax.random.normal(jax.random.key(n), shape) for n in range(3))
    frequency = attention.inverse_frequencies(attention.ROPE, 16)
    angle = jnp.arange(24, dtype=jnp.float32)[:, None] * frequency
    plain = attention.rotated(
        lambda q, k, v, cos, sin: jax.nn.dot_product_attention(q, k, v, is_causal=True)
    )
    peer = jax.jit(plain)(query, key, value, jnp.cos(angle), jnp.sin(angle))
    control = list(attention.ours("xla"))[2]
    assert control.name == "xla: plain causal"
    ours = jax.jit(control.attention)(query, key, value, jnp.cos(angle), jnp.sin(angle))
    assert jnp.allclose(peer, ours, atol=1e-5)


def test_decode_chain_calls_layer_after_layer(monkeypatch):
    monkeypatch.setattr(decode, "CACHE", 1e4)
    monkeypatch.setattr(decode, "CHAIN", 1e-9)
    step = jax.jit(partial(decode.ours, "xla", decode.DCA))
    variant = decode.Variant("xla", step, stacked=True)
    chain = decode.chain_of_calls(variant, (2, 32, 4, 2, 16), 1e9)
    query, key, value = chain.make_inputs()
    assert chain.calls == len(key) > 1
    lengths = jnp.array([32, 7], jnp.int32)
    rows = decode.make_rows(
        query.shape, dca=decode.DCA, rope=decode.ROPE, lengths=lengths, query_offset=lengths - 1
    )
    expected = query
    for layer in range(chain.calls):
        out = step(expected, key, value, rows, jnp.int32(layer))
        expected = expected + out * jnp.bfloat16(2**-10)
    assert jnp.allclose(chain.run(query, key, value, lengths), expected, atol=2e-2)

    apart = decode.Variant("xla", step, stacked=False)
    _, keys, _ = decode.chain_of_calls(apart, (2, 32, 4, 2, 16), 1e9).make_inputs()
    assert len(keys) == len(key)
    assert keys[0].shape == key[0].shape


def test_key_blocks_rows(tmp_path):
    """The checks are those of test_blocks.py; here, what is timed."""
    out = tmp_path / "key_blocks.json"
    key_blocks.measure(
        out,
        implementation="xla",
        what="lists,decode",
        lengths="640",
        queries=256,
        shares="100,20",
        heads="2/1",
        head_dim=16,
        decoded="256",
        batches="1",
        pages="128",
    )
    rows = {row["variant"]: row for row in json.loads(out.read_text())["rows"]}
    assert not [row for row in rows.values() if "failed" in row]
    assert rows["lists of 100 %"]["kept"] == 1
    # Of tiles 3 and 4, one block and one of 3 and 4 full ones, and each its own.
    assert rows["lists of 20 %"]["kept"] == (2 + 2) / (3 + 4 + 2)
    assert {"pages of 128, in order", "pages of 128, in any order"} < set(rows)


def test_what_packing_costs_has_its_standard_error():
    """Of paired differences: what the windows have in common does not count."""
    exact = [3.0, 5.0, 4.0, 2.0]
    found = quality.compared([3.01, 5.03, 4.02, 2.02], exact)
    assert found["loss"] == pytest.approx(np.expm1(0.02))
    assert found["error"] == pytest.approx(0.01 * (2 / 3) ** 0.5 / 2)
    assert (found["least"], found["most"]) == pytest.approx((np.expm1(0.01), np.expm1(0.03)))
    assert "error" not in quality.compared([3.01], [3.0])


def test_cells_of_the_quality_study():
    """Dense and the default first at every length; shares that keep the same blocks once."""
    cells = list(
        sparse_quality.cells_of([65_536, 16_384], [131_072], ["rows", "pooled"], [0.1, 0.05, 0.2])
    )
    assert len(cells) == len(set(cells))
    names = [(cell.tokens, cell.sparse) for cell, _ in cells]
    long, short = (65_536, 131_072), 16_384
    assert names[:2] == [(65_536, "off"), (65_536, "rows:0.1")]
    wanted = {
        (n, f"{name}:{share}") for n in long for name in ("rows", "pooled") for share in SHARES
    }
    assert set(names) == wanted | {(n, "off") for n in (*long, short)} | {
        (short, "rows:0.1"),  # at least 32 of 128 blocks: 5 and 20 % are no others
        (short, "pooled:0.1"),
    }


def test_summary_of_the_quality_study(tmp_path):
    log = sparse_quality.Log(tmp_path / "readings.jsonl", {"model": "m"})
    for selector, share, moved, found in (
        *(("off", 1.0, 0.0, [True, False]), ("rows", 0.1, 0.02, [False, True])),
    ):
        for text in (0, 1):
            cell = {"tokens": 65_536, "selector": selector, "share": share}
            row = {"nll": 2.0 + text + moved * text, "found": found, "answers": [1.0, 3.0]}
            log.add(cell | {"text": text, "kind": "needles"} | row)
    log.add(
        {"tokens": 16_384, "selector": "rows", "share": 0.1, "text": 0, "kind": "needles"} | row
    )
    dense, sparse = sparse_quality.Log(log.path, {"model": "m"}).summary()  # no row without dense
    assert dense["sparse"] == "off"
    assert dense["loss"] == 0
    assert sparse["sparse"] == "rows:0.1"
    assert sparse["loss"] == pytest.approx(np.expm1(0.01))
    assert sparse["error"] == pytest.approx(0.01)
    assert [sparse[name] for name in ("needles", "missed", "gained", "answer")] == [4, 2, 2, 2.0]
    assert 0.13 < sparse["share"] < 0.14  # the first tiles keep 32 blocks
    with pytest.raises(InputError, match="give another --out"):
        sparse_quality.Log(log.path, {"model": "other"})


def test_decode_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "CACHE", 1e4)
    monkeypatch.setattr(decode, "CHAIN", 1e-9)
    monkeypatch.setattr(decode, "copy_bandwidth", lambda: 1e10)
    out = tmp_path / "decode.json"
    decode.measure(
        out,
        lengths="32",
        batches="1,2",
        heads="4/2",
        head_dim=16,
        variants="plain,cuDNN,int8,empty",
    )
    figures = json.loads(out.read_text())
    assert figures["copy GB/s"] == 10
    found = {(r["batch"], r["lengths"], r["variant"]): r for r in figures["rows"]}
    assert set(found) == {
        (batch, kind, name)
        for batch, kind in ((1, "full"), (2, "full"), (2, "ragged"))
        for name in ("empty loop", "xla: plain causal", "cuDNN", "xla: DCA int8")
    }
    in_8_bits = found[2, "full", "xla: DCA int8"]
    moved = 2 * 2 * (16 + 4) * 2 * 32
    assert in_8_bits["GB/s"] == pytest.approx(moved / in_8_bits["us"] / 1e3)
    assert 0 < in_8_bits["error"] < 1e-2
    ragged = found[2, "ragged", "xla: plain causal"]
    moved = 2 * 2 * 16 * 2 * (16 + 32)  # bytes of keys and values of the two rows
    assert ragged["GB/s"] == pytest.approx(moved / ragged["us"] / 1e3)
    assert ragged["share"] == pytest.approx(ragged["GB/s"] / 10)
    assert "cuDNN" in found[1, "full", "cuDNN"]["failed"]
    decode.show_files([out])


@pytest.fixture(scope="module")
def model():
    return generate.random_model(generate.PRESETS["tiny"], dca=True, implementation=None)


def test_random_model_has_bfloat16_weights_like_an_initialized_one(model):
    assert {leaf.dtype for leaf in jax.tree.leaves(model)} == {jnp.dtype(jnp.bfloat16)}
    kernel = model.layers.mlp.up_proj.kernel[...].astype(jnp.float32)
    assert float(kernel.std()) == pytest.approx(0.02, rel=0.05)
    assert not jnp.array_equal(kernel[0], kernel[1])
    assert not jnp.array_equal(kernel, model.layers.mlp.gate_proj.kernel[...].astype(jnp.float32))
    assert jnp.all(model.norm.scale[...] == 1)


def test_generate_measures_ours_and_transformers(model, monkeypatch):
    monkeypatch.setattr(generate, "random_model", lambda *args, **options: model)
    config = generate.PRESETS["tiny"]
    facts, ours = generate.measure_ours(True, config, [20], 3, None, None, "bfloat16")
    assert facts["copy GB/s"] > 0
    (peer,) = generate.measure_transformers(config, [20], 3, None, None, "bfloat16")
    for row in (ours, peer):
        assert "failed" not in row
        assert row["first token ms"] > 0
        assert row["ms/token"] > 0
        assert row["tokens/s"] > 0
    assert ours["GB/token"] == pytest.approx(peer["GB/token"])


def test_generate_rates_ours_by_transformers_whichever_comes_first(tmp_path):
    ours = {"model": "m", "tokens": 8, "engine": generate.OURS, "prefill ms": 2.0}
    ours |= {"ms/token": 4.0, "GB/token": 6.0}
    peer = {"model": "m", "tokens": 8, "engine": generate.PEER, "prefill ms": 3.0}
    failed = {"model": "m", "tokens": 9, "engine": generate.PEER, "failed": "out of memory"}
    for order in ([ours, peer, failed], [failed, peer, ours]):
        report = common.Report(tmp_path / "report.json", {"copy GB/s": 3000.0})
        for row in order:
            report.add(generate._rated(dict(row), report))
        (rated,) = (row for row in report.rows if row["engine"] == generate.OURS)
        assert rated["prefill speed"] == 1.5
        assert rated["share"] == pytest.approx(0.5)  # 6 GB at 3000 GB/s, over 4 ms
        assert "decode speed" not in rated


@pytest.mark.parametrize("number", range(7))
def test_tuning_knows_every_kernels_tiles(number):
    kernel = [*tune_attention.MOSAIC_KERNELS, *tune_attention.triton_kernels()][number]
    assert callable(kernel.backend.forward)
    for head_dim, entry in kernel.tables().items():
        first = next(tune_attention.candidates(kernel, kernel.tiles(entry)))
        assert kernel.entry(entry, first) == entry, head_dim


def test_tuning_starts_from_the_present_tiles_and_leaves_them():
    kernel = next(k for k in tune_attention.triton_kernels() if k.name == "triton forward")
    table = kernel.tables()
    present = table[64]
    choices = list(tune_attention.candidates(kernel, kernel.tiles(present)))
    assert choices[0] == {name: getattr(present.forward, name) for name in kernel.grid}
    assert len(choices) == len({tuple(choice.values()) for choice in choices}) > 10
    entry = kernel.entry(present, choices[-1])
    assert entry.decode == present.decode
    with (
        pytest.raises(ZeroDivisionError),
        tune_attention.replaced(table, 64, entry),
    ):
        assert table[64].forward.num_warps == choices[-1]["num_warps"]
        raise ZeroDivisionError
    assert table[64] is present


@pytest.mark.parametrize(
    ("mesh", "rank", "base"), [("fsdp=2", 0, "dtype"), ("tensor=1", 4, "int8")]
)
def test_finetune_times_updates(monkeypatch, mesh, rank, base):
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
    )
    monkeypatch.setitem(finetune.SHAPES, "tiny", config)
    row = finetune.measure_here(
        finetune.Variant(
            *("tiny", mesh, 96, 2, 1, "attention", rank, base), state="float32", texts=2, updates=1
        )
    )
    assert row["loss"] == pytest.approx(np.log(64), rel=0.05)  # random tokens, before any learning
    devices = 2 if mesh == "fsdp=2" else 1
    assert row["tokens_per_second_device"] == pytest.approx(2 * 96 / row["seconds"] / devices)


def test_products_of_experts_are_held_against_float32_and_timed():
    config = generate.PRESETS["tiny-experts"]
    rows = experts.measure_products(config, 24, 64, 32)
    assert [row["way"].split(",")[0] for row in rows] == ["dense", "ragged", "blocks"] * 2
    assert all(row["ms"] > 0 for row in rows)
    assert [row["chosen"] for row in rows] == [False, False, True] * 2
    assert all(row["error"] < 1e-5 for row in rows if row["error"] is not None)
    assert [row["rows"] for row in experts.measure_few(config)] == [2, 2]


def test_packed_matrices_are_timed_in_every_way(tmp_path, monkeypatch):
    """By XLA, by the kernel with its tiles, and as a model chooses; the plans for one row too."""
    monkeypatch.setattr(packed.few_rows, "INTERPRET", packed.few_rows.INTERPRET)  # the script's
    out = tmp_path / "packed.json"
    options = {"minutes": 10.0, "only": "tiny", "forms": "int8", "rows": "2", "tiny": True}
    packed.matrices(out=out, **options)
    rows = json.loads(out.read_text())["rows"]
    assert not [row for row in rows if "failed" in row]
    ways = {row["way"]: row["error"] for row in rows if "error" in row}
    assert ways.keys() == {"unpacked, dot", "XLA sum", "ours", "kernel 128x64 /2 w4 s3"}
    assert ways["ours"] < 1e-5
    with lowering.device("NVIDIA H200"):
        plans = packed.row_plans((8192, 28_672), "int4:128")
        assert packed.row_plans((8192, 28_672), "fp8") == []
    assert len({plan.splits for plan in plans}) > 3
    assert packed.row_plans((8192, 28_672), "int4:128") == []


def test_methods_are_compared_and_timed(tmp_path, monkeypatch, capsys):
    """Attention beside the plain XLA form, and a model's reading; a wrong output is not timed."""
    monkeypatch.setattr(methods, "CHECKED", 64)
    monkeypatch.setattr(methods, "NARROW", (128,))
    options = {"shapes": "tiny", "tokens": "512", "minutes": 10.0}
    out = tmp_path / "methods.json"
    methods.measure(out=out, methods="dca rope lampe", what="attention,read", **options)
    rows = json.loads(out.read_text())["rows"]
    assert not [row for row in rows if "failed" in row]
    assert [row["what"] for row in rows] == ["attention"] * 3 + ["read"] * 3
    assert all(row["error"] < 0.01 for row in rows[:3])
    assert [row["of DCA"] for row in rows[::3]] == [1, 1]
    assert all(row["of DCA"] > 0 for row in rows)

    monkeypatch.setattr(methods, "attention", lambda case, query, key, value: query)
    methods.measure(out=out, methods="dca", what="attention", **options)
    (row,) = json.loads(out.read_text())["rows"]
    assert "differs" in row["failed"]
    assert "ms" not in row
    with pytest.raises(SystemExit):
        methods.measure(out=out, **options | {"shapes": "huge"}, methods="dca", what="speed")
    assert "huge, speed: not known" in capsys.readouterr().err

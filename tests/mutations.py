"""Does the suite notice? Deliberate faults, one at a time, and the tests that should fail.

    python tests/mutations.py                  # each fault, with the quickest tests that know it
    python tests/mutations.py --only cache     # faults whose name or file contains this
    python tests/mutations.py --all-tests      # each fault, with the whole suite (hours)

Every fault is made in a copy of the tree, never in the tree itself. It replaces a text that must
occur exactly once in its file; otherwise it fails loudly, because the code has moved. Exit status 1
means that a fault was missed.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parent.parent
COPIED = ("dca_jax", "checkpoints_convert", "examples", "benchmarks", "docs", "tests")


class Fault(NamedTuple):
    """A fault, and the arguments with which pytest should notice it."""

    name: str
    file: str  # in dca_jax/
    old: str
    new: str
    tests: str  # split at blanks; `-k` takes one word


EDGES = "tests/test_backends.py::test_edges_as_shapes"
OFFSET = "tests/test_backends.py::test_offset_lengths_and_temperature"
HUGGING_FACE = "tests/test_model.py::test_logits_equal_transformers[llama-2]"
RING = "tests/test_context.py::test_equals_the_oracle[short_chunks]"
BLACKWELL = "tests/test_mosaic_blackwell.py::test_more_blocks_than_are_in_flight[64-bfloat16-30.0]"
FAULTS = [
    # --- families ---
    Fault(
        "a query is not normed before it is rotated",
        "layers.py",
        "query, key = self.q_norm(query), self.k_norm(key)",
        "key = self.k_norm(key)",
        "tests/test_model.py::test_logits_equal_transformers[qwen3]",
    ),
    Fault(
        "a row on a CPU multiplies by a matrix's first block again and again",
        "products/cpu_rows.py",
        "(number, at, 0), (1, size, outputs)",
        "(number, 0, 0), (1, size, outputs)",
        "tests/test_cpu_rows.py::test_blocks_of_inputs[320-float32]",
    ),
    Fault(
        "inputs that two blocks share count twice on a CPU",
        "products/cpu_rows.py",
        "jnp.where(at + jnp.arange(size) >= first, row, 0)",
        "row",
        "tests/test_cpu_rows.py::test_blocks_of_inputs[317-float32]",
    ),
    Fault(
        "blocks of outputs on a CPU have the first block's scales",
        "products/cpu_rows.py",
        "cut(part, 2, at // each, size // each)",
        "cut(part, 2, jnp.int32(0), size // each)",
        "tests/test_cpu_rows.py::test_blocks_of_outputs[128-90-int8-1-float32]",
    ),
    Fault(
        "a tile's sums lack the last step",
        "products/dense_kernel.py",
        "lax.fori_loop(0, steps, add, None)",
        "lax.fori_loop(0, steps - 1, add, None)",
        "tests/test_dense_rows.py::test_rows_times_a_layers_matrices[float16-1-widths1-residual-plan1]",
    ),
    Fault(
        "a gate is rounded before it multiplies",
        "products/dense_kernel.py",
        "total = total / (1 + jnp.exp(-total)) * up[0]",
        "total = (total / (1 + jnp.exp(-total))).astype(smem.out.dtype) * up[0]",
        "tests/test_dense_rows.py::test_rows_times_a_layers_matrices[bfloat16-8-widths4-gated-plan4]",
    ),
    Fault(
        "an adapted o_proj is taken for a plain one",
        "layers.py",
        "return self.lora is None and self.bias is None",
        "return self.bias is None",
        "tests/test_dense_rows.py::test_a_token_has_few_launches[lora]",
    ),
    Fault(
        "rows in float32 are left to a kernel that has none",
        "layers.py",
        "few, norm = jax.ShapeDtypeStruct((rows, inputs), x.dtype)",
        "few, norm = jax.ShapeDtypeStruct((rows, inputs), stack.dtype)",
        "tests/test_dense_rows.py::test_a_token_has_few_launches[bias]",
    ),
    Fault(
        "the weights of chosen experts do not add up to 1",
        "experts.py",
        "weights = weights / weights.sum(axis=-1, keepdims=True)",
        "weights = weights",
        "tests/test_experts.py::test_gradients_are_those_of_a_dense_computation[True]",
    ),
    Fault(
        "padding counts in how evenly experts are chosen",
        "experts.py",
        "probabilities = jnp.where(real[..., None], routing.probabilities, 0)",
        "probabilities = routing.probabilities",
        "tests/test_experts.py::"
        "test_mixtral_and_the_loss_of_uneven_choices_are_those_of_transformers",
    ),
    Fault(
        "a short text is read by the config for long ones",
        "weights/huggingface.py",
        "context > most",
        "context < most",
        "tests/test_config.py::test_the_checkpoints_that_ask_for_dca_through_the_commands[30b]",
    ),
    # --- the mathematics ---
    Fault(
        "the succ position has the wrong sign",
        "dca.py",
        "jnp.minimum(index % s + s, dca.max_query_position)",
        "jnp.minimum(index % s - s, dca.max_query_position)",
        "tests/test_dca.py::test_figure_2_of_the_paper",
    ),
    Fault(
        "a query does not meet itself",
        "dca.py",
        "return chunk_start, index + 1",
        "return chunk_start, index",
        f"{EDGES}[xla-7]",
    ),
    Fault(
        "the oracle's mask is off by one",
        "dca.py",
        "met = (j[:, None, :] <= i[:, :, None])",
        "met = (j[:, None, :] < i[:, :, None])",
        f"{EDGES}[reference-7]",
    ),
    Fault(
        "one token beyond two chunks counts as two chunks",
        "dca.py",
        "2 if num_keys <= 2 * dca.chunk_len else 3",
        "2 if num_keys <= 2 * dca.chunk_len + 1 else 3",
        "tests/test_dca.py::test_phases_within",
    ),
    Fault(
        "the temperature is not squared",
        "dca.py",
        "jnp.log(ratio), 1.0) ** 2",
        "jnp.log(ratio), 1.0)",
        f"{OFFSET}[reference]",
    ),
    Fault(
        "theta is not the model's",
        "rope.py",
        "np.power(np.float64(rope.theta), exponent",
        "np.power(np.float64(10_000.0), exponent",
        "tests/test_rope.py::test_equals_transformers",
    ),
    Fault(
        "a plane is turned the wrong way",
        "rope.py",
        "second * cos + first * sin], axis=-1)",
        "second * cos - first * sin], axis=-1)",
        "tests/test_rope.py::test_rotation_equals_transformers",
    ),
    # --- texts packed into a row ---
    Fault(
        "what a packed text's keys are given is not turned back",
        "attention/packed.py",
        "parts = (dq, *back(dk), dv)",
        "parts = (dq, dk, dv)",
        "tests/test_packed.py::test_each_text_is_read_alone_in_value_and_gradient",
    ),
    # --- the op and its backends ---
    Fault(
        "keys are not rotated",
        "attention/op.py",
        "return rotate(key, key_position(index, dca or PLAIN), inv_freq)",
        "return key",
        f"{EDGES}[reference-7]",
    ),
    Fault(
        "the scale is applied twice",
        "rope.py",
        "attention_factor(rope) ** 2 / math.sqrt(head_dim))",
        "attention_factor(rope) ** 2 / head_dim)",
        f"{EDGES}[reference-7]",
    ),
    Fault(
        "delta is dropped in the backward pass",
        "attention/op.py",
        "delta = output_delta(do, out, lse.dtype)",
        "delta = jnp.zeros_like(lse)",
        f"{EDGES}[xla-7]",
    ),
    Fault(
        "no gradient flows through the log-sum-exp of a pass",
        "attention/op.py",
        "delta = delta - jnp.where(jnp.isfinite(lse), dlse, 0)",
        "pass",
        "tests/test_backends.py::test_passes_merge_into_the_whole_and_have_its_gradient[xla]",
    ),
    Fault(
        "weights of a merge are swapped",
        "attention/softmax.py",
        "zip(weights, outs, strict=True)",
        "zip(weights[::-1], outs, strict=True)",
        "tests/test_attention.py::test_log_sum_exp_of_a_pass",
    ),
    Fault(
        "the last block of keys is lost",
        "attention/xla.py",
        "first, -((first - last) // block)",
        "first, (last - first) // block",
        f"{EDGES}[xla-65]",
    ),
    Fault(
        "the last block's first keys count twice",
        "attention/xla.py",
        "(j >= jnp.maximum(first, start)[:, :, None])",
        "(j >= first[:, :, None])",
        f"{EDGES}[xla-65]",
    ),
    Fault(
        "a block that only the last query attends to completely is not masked",
        "attention/xla.py",
        "(jnp.min(stop) - first) // block",
        "(jnp.max(stop) - first) // block",
        f"{EDGES}[xla-65]",
    ),
    Fault(
        "a block that only the first query attends to completely is not masked",
        "attention/xla.py",
        "(first - jnp.max(start)) // block",
        "(first - jnp.min(start)) // block",
        "tests/test_backends.py::test_slices_of_the_keys[xla]",
    ),
    Fault(
        "the first token of padding is attended from",
        "attention/xla.py",
        "stop = jnp.where(index < rows.lengths[:, None], band.stop, start)",
        "stop = jnp.where(index <= rows.lengths[:, None], band.stop, start)",
        "tests/test_backends.py::test_texts_that_end_at_an_edge[xla]",
    ),
    Fault(
        "a query's gradient is turned on, not back",
        "attention/xla.py",
        "rotate(drotated, -position, rows.inv_freq)",
        "rotate(drotated, position, rows.inv_freq)",
        f"{EDGES}[xla-7]",
    ),
    Fault(
        "the ring meets the wrong half",
        "attention/parallel/ring.py",
        "half = jnp.where(sender < self.device, EARLY, LATE)",
        "half = jnp.where(sender < self.device, LATE, EARLY)",
        RING,
    ),
    Fault(
        "a device writes its late block over its early one",
        "attention/parallel/zigzag.py",
        "jnp.where(block == late, width + within, num_local)",
        "jnp.where(block == late, within, num_local)",
        "tests/test_context.py::test_layout_on_the_devices",
    ),
    # --- the model and its cache ---
    Fault(
        "the cache is written one slot off",
        "attention/layer.py",
        "slots = index if context == 1",
        "slots = index + 1 if context == 1",
        "tests/test_model.py::test_golden_logits_and_decoding",
    ),
    Fault(
        "a cache's frequencies change while it grows",
        "model.py",
        "jnp.where(start == 0, context_lengths, cache.frequency_lengths)",
        "jnp.where(start == 0, context_lengths, context_lengths)",
        "tests/test_model.py::test_dynamic_ntk_keeps_its_frequencies_while_decoding",
    ),
    Fault(
        "a tied head trains no embedding",
        "model.py",
        'return self.embed_tokens.embedding[...], "VD"',
        'return jax.lax.stop_gradient(self.embed_tokens.embedding[...]), "VD"',
        "tests/test_finetune_train.py::test_a_tied_head_trains_the_embedding",
    ),
    Fault(
        "a rollback forgets nothing",
        "kv_cache.py",
        "jnp.minimum(jnp.asarray(lengths), self.lengths)",
        "self.lengths",
        "tests/test_model.py::test_rollback_is_exact",
    ),
    Fault(
        "values in 8 bits are multiplied by the scales of keys",
        "attention/xla.py",
        "read_scales(scales.value, at, block)",
        "read_scales(scales.key, at, block)",
        "tests/test_backends.py -k 8_bits",
    ),
    Fault(
        "a scale is written beside its key",
        "attention/layer.py",
        "jnp.divmod(slots, all_slots.shape[-1])",
        "jnp.divmod(slots + 1, all_slots.shape[-1])",
        "tests/test_model.py::test_a_cache_in_8_bits_is_what_is_read",
    ),
    # --- other position methods ---
    Fault(
        "a key at a query's own step stands nearer",
        "attention/bands.py",
        "self.key(index)[:, None, :] > self.query",
        "self.key(index)[:, None, :] >= self.query",
        "tests/test_rivals.py::test_relative_positions_are_the_formula[adagrope]",
    ),
    Fault(
        "the gradient of a step's two logits goes to one",
        "attention/xla.py",
        "for which in (~nearer, nearer)]",
        "for which in (~nearer, ~nearer)]",
        "tests/test_rivals.py::test_gradient[adagrope]",
    ),
    Fault(
        "a query that meets nothing reads its tile's full blocks",
        "attention/mosaic_gpu/ranges.py",
        "by_all = (met | ~present).all(axis=2) & met.any(axis=2)",
        "by_all = met.any(axis=2)",
        "tests/test_band_forward.py::test_a_tile_walks_over_each_block_that_it_meets",
    ),
    Fault(
        "some workers omit their last tile, and others invent one",
        "attention/mosaic_gpu/forward_schedule.py",
        "(self._place_in(jnp.int32(rows)) < rest).astype(jnp.int32)",
        "(self.number < rest).astype(jnp.int32)",
        "tests/test_mosaic_gpu.py::test_workers_share_the_tiles",
    ),
    Fault(
        "a band's values are those of the first layer",
        "attention/mosaic_gpu/band_forward.py",
        "value_row = layer * batch + row",
        "value_row = row",
        "tests/test_band_forward.py::test_what_is_launched_is_the_definition[rerope]",
    ),
    Fault(
        "padding on Ampere gets what its tile's full blocks give",
        "attention/mosaic_ampere/flash_forward.py",
        "met = (state.l_i > 0) & is_text",
        "met = state.l_i > 0",
        "tests/test_backends.py::test_offset_lengths_and_temperature[mosaic_ampere]",
    ),
    Fault(
        "gradients of keys on Ampere are in units of log2",
        "attention/mosaic_ampere/flash_backward.py",
        "(dk * math.log(2))",
        "dk",
        f"{EDGES}[mosaic_ampere-7]",
    ),
    Fault(
        "a span on Ampere begins at its own first step",
        "attention/mosaic_ampere/walks.py",
        "axis=2) - (ends - counts)",
        "axis=2)",
        "tests/test_mosaic_ampere.py::test_steps_are_those_of_the_walks",
    ),
    # --- Blackwell's kernel ---
    Fault(
        "logits are written over weights that are still read",
        "attention/mosaic_blackwell/warps.py",
        "    plgpu.barrier_wait(smem.added[tile])",
        "    pass",
        BLACKWELL,
    ),
    Fault(
        "queries are replaced while they are multiplied",
        "attention/mosaic_blackwell/warps.py",
        "    pl.when(previous >= 0)(lambda: plgpu.barrier_wait(smem.q_consumed))",
        "    pass",
        BLACKWELL,
    ),
    Fault(
        "a sum keeps its scale where a maximum grows",
        "attention/mosaic_blackwell/softmax.py",
        "lambda acc: acc * _along(decay, acc)",
        "lambda acc: acc",
        BLACKWELL,
    ),
    Fault(
        "an edge's mask lets one key too many through",
        "attention/mosaic_blackwell/softmax.py",
        "(j < upper)",
        "(j <= upper)",
        f"{EDGES}[mosaic_blackwell-7]",
    ),
    # --- lists of key blocks ---
    Fault(
        "edges behind a phase's full blocks are not read",
        "attention/blocks.py",
        "after = jnp.where(met & any_full, end - full_end, 0)",
        "after = jnp.zeros_like(before)",
        "tests/test_blocks.py::test_attention_over_lists[xla-ragged]",
    ),
    Fault(
        "the phases of a list are counted in another order",
        "attention/blocks.py",
        "dtype=jnp.int32) for x in listed], 3)",
        "dtype=jnp.int32) for x in listed[::-1]], 3)",
        "tests/test_blocks.py::test_attention_over_lists[xla-ragged]",
    ),
    Fault(
        "a selector's softmax is also over later keys",
        "attention/sparse/masses.py",
        "met = (j >= low) & (j < stop[:, :, None])",
        "met = j >= low",
        "tests/test_sparse.py::test_a_selector_is_its_definition[rows:0.4]",
    ),
    # --- drawing ---
    Fault(
        "top_p keeps one token too few",
        "inference/sampling.py",
        "rare = ((below <= 1.0 -",
        "rare = ((jnp.roll(below, 1, axis=-1) <= 1.0 -",
        "tests/test_sampling.py::test_filters_equal_those_of_transformers",
    ),
    Fault(
        "the penalty makes a negative logit likelier",
        "inference/sampling.py",
        "jnp.where(logits < 0, logits * penalty, logits / penalty)",
        "logits / penalty",
        "tests/test_sampling.py::test_repetition_penalty_equals_that_of_transformers",
    ),
    Fault(
        "a stop id ends no row",
        "inference/steps.py",
        "jnp.any(token[:, None] == stop_ids[None, :], axis=1)",
        "jnp.all(token[:, None] == stop_ids[None, :], axis=1)",
        "tests/test_generate.py::test_a_row_ends_at_a_stop_id_and_grows_no_more",
    ),
    Fault(
        "all rows draw alike",
        "inference/steps.py",
        "(jax.random.key(seed), rows))",
        "(jax.random.key(seed), 0 * rows))",
        "tests/test_generate.py::test_a_seed_is_reproducible_and_rows_draw_apart",
    ),
    Fault(
        "a prefix believes that it still holds what was written over",
        "inference/prefix.py",
        "self._held = self._alike(common_beginning(self.tokens, self._read), prompt)",
        "self._held = len(self.tokens)",
        "tests/test_llm.py::test_what_another_conversation_wrote_over_is_read_again",
    ),
    Fault(
        "each token is asked to predict itself",
        "inference/score.py",
        "tokens[:, row, : len(given)] = given, wanted",
        "tokens[:, row, : len(given)] = given, given",
        "tests/test_llm.py::test_perplexity_is_that_of_the_logits",
    ),
    Fault(
        "a choice is read after the choice before it",
        "inference/score.py",
        "cache = cache.rollback(shared)",
        "cache = cache.rollback(shared) if turn == 0 else cache",
        "tests/test_lm_eval_parity.py::test_a_context_of_several_choices_is_read_once",
    ),
    # --- other people's benchmarks ---
    Fault(
        "RULER's search draws a sample less",
        "evaluation/ruler/drawing.py",
        "return max(int((limit / (tokens / step)) * 3), step * 2)",
        "return max(int((limit / (tokens / step)) * 2), step * 2)",
        "tests/test_evaluation_ruler.py::test_prompts_are_those_of_rulers_own_generator",
    ),
    Fault(
        "a letter is as likely as the one after it",
        "evaluation/longbench_v2.py",
        "one.nll[shared - once :]",
        "one.nll[shared - once + 1 :]",
        "tests/test_evaluation_benchmarks.py::test_letters_are_as_likely_as_transformers_has_them",
    ),
    # --- finetuning ---
    Fault(
        "LoRA is scaled by alpha",
        "config.py",
        "return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)",
        "return self.alpha",
        "tests/test_lora.py::test_an_adapter_means_to_peft_what_it_means_here",
    ),
    Fault(
        "adapters are merged unscaled",
        "weights/adapters.py",
        "np.float32(lora.scale) * delta",
        "delta",
        "tests/test_lora.py::test_logits_are_those_of_the_merged_model",
    ),
    Fault(
        "accumulated gradients are a mean of means",
        "finetune/train.py",
        "return jax.tree.map(jnp.add, sums, (nll, tokens, gradients)), None",
        "means = jax.tree.map(lambda x: x / tokens, (nll, tokens, gradients))\n"
        "        return jax.tree.map(jnp.add, sums, means), None",
        "tests/test_finetune_train.py::"
        "test_loss_and_gradient_are_those_of_a_dense_float64_computation[4]",
    ),
    Fault(
        "norms decay",
        "finetune/train.py",
        'path[-1].key not in ("scale", "bias")',
        'path[-1].key not in ("bias",)',
        "tests/test_finetune_train.py::test_updates_are_adamw",
    ),
    Fault(
        "a token's loss counts if the token before it is trained",
        "finetune/loss.py",
        "counts = jax.lax.pad(trained, jnp.bool_(False), next_token)",
        "counts = trained",
        "tests/test_finetune_train.py::"
        "test_loss_and_gradient_are_those_of_a_dense_float64_computation[1]",
    ),
    # --- memory, shapes and disks ---
    Fault(
        "what cannot fit is not refused before weights are read",
        "planning/room.py",
        "if job.usage(sizes).total > TOLERANCE * device.memory:",
        "if job.usage(sizes).total > 1e30 * device.memory:",
        "tests/test_memory.py::test_a_batch_is_refused_with_one_that_fits",
    ),
    Fault(
        "logits are of the padded text's length",
        "inference/logits.py",
        "lengths = np.full((rows,), length, np.int32)",
        "lengths = np.full((rows,), width, np.int32)",
        "tests/test_llm.py::test_logits_of_any_length_and_batch_in_few_programs[dynamic]",
    ),
    Fault(
        "half a line stays on a full disk",
        "disk.py",
        "            os.ftruncate(file.fileno(), size)",
        "            os.ftruncate(file.fileno(), size + 1)",
        "tests/test_disk.py::test_a_line_is_appended_whole_or_not_at_all",
    ),
    # --- weights ---
    Fault(
        "rows of a GGUF file's queries and keys stay in its own order",
        "weights/gguf.py",
        'elif permuted and (".attn_q." in own or ".attn_k." in own):',
        'elif permuted and (".attn_q." in own):',
        "tests/test_gguf.py::test_weights_are_those_of_transformers_to_the_bit",
    ),
    Fault(
        "GPTQ's zeros are one too few",
        "weights/quantized.py",
        'more = 0 if form == "gptq_v2" else 1',
        "more = 0",
        "tests/test_quantized.py::test_packed_weights",
    ),
    Fault(
        "a packed weight's groups are counted from where a piece begins",
        "weights/quantized.py",
        "number = np.arange(columns.start, columns.stop) // group",
        "number = np.arange(columns.stop - columns.start) // group",
        "tests/test_quantized.py::test_packed_weights",
    ),
    Fault(
        "heads that differ from tied embeddings are thrown away",
        "weights/huggingface.py",
        "    if not same:\n",
        "    if same is None:\n",
        "tests/test_huggingface.py::test_tied_embeddings_that_differ",
    ),
]


def copy_of_the_tree(place: Path) -> None:
    for name in COPIED:
        ignored = shutil.ignore_patterns("__pycache__", "_build", "_generated")
        shutil.copytree(REPOSITORY / name, place / name, ignore=ignored)
    for file in (*REPOSITORY.glob("*.md"), REPOSITORY / "pyproject.toml", REPOSITORY / "Makefile"):
        shutil.copy(file, place)


def tests_notice(fault: Fault, all_tests: bool) -> tuple[bool, str]:
    """Whether tests fail because of the fault, and the first that did, or what happened instead."""
    source = REPOSITORY / "dca_jax" / fault.file
    text = source.read_text(encoding="utf-8")
    if (found := text.count(fault.old)) != 1:
        sys.exit(f"{fault.name}: {fault.file} holds {found} times, not once:\n{fault.old}")
    with tempfile.TemporaryDirectory() as name:
        tree = Path(name)
        copy_of_the_tree(tree)
        (tree / "dca_jax" / fault.file).write_text(text.replace(fault.old, fault.new))
        what = [] if all_tests else ["-m", "", *fault.tests.split()]
        run = subprocess.run(
            [
                sys.executable,
                "-m",
                "pytest",
                "-x",
                "-q",
                "-n",
                "0",
                "-p",
                "no:cacheprovider",
                *what,
            ],
            cwd=tree,
            env=os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
        )
    lines = run.stdout.splitlines()
    failed = [line for line in lines if line.startswith("FAILED ")]
    # 1: a test failed. Anything else (2: not collected, 4: no such test, 5: none) is not a
    # detection.
    if run.returncode == 1 and failed:
        return True, failed[0].removeprefix("FAILED ").split(" - ")[0]
    return False, lines[-1] if lines else run.stderr[-200:]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--all-tests", action="store_true", help="the whole suite for each fault")
    parser.add_argument("--only", default="", help="faults whose name or file contains this")
    options = parser.parse_args()
    chosen = [fault for fault in FAULTS if options.only in f"{fault.name} {fault.file}"]
    missed = 0
    for fault in chosen:
        begin = time.perf_counter()
        noticed, how = tests_notice(fault, options.all_tests)
        missed += not noticed
        seconds = time.perf_counter() - begin
        verdict = "caught" if noticed else "MISSED"
        print(f"{verdict} {seconds:5.0f} s  {fault.file:28} {fault.name}: {how}", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} faults were caught")
    sys.exit(1 if missed or not chosen else 0)


if __name__ == "__main__":
    main()

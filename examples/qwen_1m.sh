#!/bin/bash
# A million-token checkpoint of Qwen's, densely and sparsely: the rows of RULER on its card, and
# needles, each with and without sparse reading. Repeat an interrupted run to resume it.
#
#   bash examples/qwen_1m.sh Qwen/Qwen3-30B-A3B-Instruct-2507 outputs/qwen-1m tensor=2
#
# MODEL is a folder or a name on the Hugging Face Hub; MESH the devices, as --mesh takes it. More
# through the environment:
#
#   LENGTHS     tokens of the texts (default: "131072 524288 1024000")
#   SELECTORS   of long prompts (default: "off auto rows:0.1 rows:0.05")
#   SAMPLES     of each task and length (default: 20, as on the cards)
#   TASKS       of lm-eval (default: ruler, which needs pip install 'dca_jax[eval]'); "" for none
#   DCA_JAX     the command (default: dca-jax)

set -euo pipefail

if (($# < 2 || $# > 3)); then
  echo "usage: $0 MODEL OUTPUT [MESH]" >&2
  exit 2
fi
model=$1 output=$2
mesh=()
if (($# == 3)); then mesh=(--mesh "$3"); fi
read -ra lengths <<<"${LENGTHS:-131072 524288 1024000}"
read -ra selectors <<<"${SELECTORS:-off auto rows:0.1 rows:0.05}"
samples=${SAMPLES:-20} tasks=${TASKS-ruler}
read -ra dca <<<"${DCA_JAX:-dca-jax}"
longest=$(printf '%s\n' "${lengths[@]}" | sort -n | tail -1)

"${dca[@]}" info "$model"
mkdir -p "$output"
for selector in "${selectors[@]}"; do
  name=${selector//:/-}
  "${dca[@]}" explain "$model" --length "$longest" --sparse "$selector"
  "${dca[@]}" eval needle "$model" --chat --method dca --sparse "$selector" --trials "$samples" \
    $(printf -- '--length %s ' "${lengths[@]}") "${mesh[@]}" --output "$output/needle-$name"
  if [[ -n $tasks ]]; then
    sizes=$(IFS=,; echo "${lengths[*]}")
    "${dca[@]}" lm-eval "$model" --method dca --sparse "$selector" --max-length "$longest" \
      "${mesh[@]}" --limit "$samples" --apply_chat_template --tasks "$tasks" \
      --metadata "{\"max_seq_lengths\":[$sizes]}" --use_cache "$output/ruler-$name" \
      --output_path "$output/ruler-$name.json"
  fi
done
"${dca[@]}" eval report "$output"

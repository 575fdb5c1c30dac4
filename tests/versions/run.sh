#!/usr/bin/env bash
# Run the interop tests in a fresh environment with the versions of tests/versions/NAME.txt:
#   tests/versions/run.sh NAME...     with NAME one of oldest, newest, core
# "core" has neither transformers nor peft: it runs the demo, and the tests that need neither.
set -euo pipefail
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS=1

interop=(
    tests/adapter/test_base_check.py tests/adapter/test_expert_adapter.py
    tests/adapter/test_peft_names.py tests/checkpoint/test_quantization_formats.py
    tests/merging/test_against_stock.py tests/merging/test_interop.py
    tests/merging/test_moe_interop.py
    tests/multimodal/test_positions.py tests/multimodal/test_reader_files.py
    tests/multimodal/test_tower_model.py
    tests/nn/test_linear.py tests/nn/test_nf4_stack.py
    tests/qwen35/test_blocks_cache.py tests/qwen35/test_blocks_parity.py
    tests/qwen35/test_model_parity.py tests/qwen35/test_moe_model_parity.py
    tests/qwen35/test_moe_parity.py tests/qwen35/test_yarn.py
)
core=(
    tests/checkpoint/test_checkpoint.py tests/checkpoint/test_layout.py
    tests/checkpoint/test_tensor_hash.py tests/io tests/nn/test_nf4_stack.py
)

failed=()
for name in "$@"; do
    versions=tests/versions/$name.txt
    venv=.venv-versions/$name
    if [[ $name == core ]]; then
        tests=("${core[@]}")
        packages=(-e core -e qwen35_plugin)
    else
        tests=("${interop[@]}")
        packages=(-e "core[interop]" -e qwen35_plugin -e qwen36_plugin -e "multimodal_plugin[video]")
    fi
    "${PYTHON:-python3}" -m venv --clear "$venv"
    # torch first and alone: its version is pinned, so that no other package picks a larger build.
    "$venv/bin/pip" install -q --disable-pip-version-check "$(grep '^torch==' "$versions")"
    "$venv/bin/pip" install -q --disable-pip-version-check -c "$versions" \
        "pytest>=8.4" "triton>=3.6,<3.7" "${packages[@]}"
    printf '%s: ' "$name"
    "$venv/bin/pip" freeze --exclude-editable |
        grep -E '^(torch|transformers|peft|safetensors|bitsandbytes|tokenizers|huggingface.hub)==' |
        paste -sd ' '
    if [[ $name == core ]]; then
        "$venv/bin/qcore" demo || failed+=("$name: demo")
    fi
    "$venv/bin/pytest" -m "not gpu and not slow and not timing" "${tests[@]}" ||
        failed+=("$name: tests")
done
if ((${#failed[@]})); then
    printf 'failed: %s\n' "${failed[@]}"
    exit 1
fi

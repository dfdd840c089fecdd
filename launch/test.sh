#!/usr/bin/env bash
# Runs lint, formatting and all tests (tests/test_docs.py builds the documentation) in the environment of the quickstart
# plus the test extras, then the web page's tests in .venv-page, which adds requirements-page.txt and which
# launch/serve.sh uses as well. Two processes share the test files, because most of a test's time is tracing, which uses
# one core. Arguments go to pytest: bash launch/test.sh -k attention
EXTRAS=test source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
source launch/page_env.sh
export JAX_PLATFORMS=cpu
none=5 # pytest's exit code where no test was chosen

# The arguments without the names of files, and of those the page's own.
own=(tests/server/test_page*.py "tests/hostile/test_hostile.py::test_hostile_inputs_are_survived[page]")
options=() pages=() named=
for argument in "$@"; do
  if [ -e "${argument%%::*}" ]; then
    named=1
    case $argument in
    *server/test_page*) pages+=("$argument") ;;
    tests/hostile*) pages+=("${own[@]: -1}") ;;
    tests | tests/ | tests/server | tests/server/) pages+=("${own[@]}") ;;
    esac
  else
    options+=("$argument")
  fi
done
[ -n "$named" ] || pages=("${own[@]}")

ruff check .
ruff format --check .
main=0 page=$none
python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart=0 --durations=15 "$@" || main=$?
[ "$main" -eq 0 ] || [ "$main" -eq "$none" ] || exit "$main"
if [ "${#pages[@]}" -gt 0 ]; then
  if page_environment playwright==1.65.2; then
    page=0
    .venv-page/bin/python -m pytest --durations=5 "${options[@]}" "${pages[@]}" || page=$?
  else
    echo "warning: requirements-page.txt could not be installed; the page's tests did not run." >&2
  fi
fi
if [ "$page" -eq "$none" ]; then exit "$main"; else exit "$page"; fi

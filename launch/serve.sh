#!/usr/bin/env bash
# Starts the server and its web page from a checkout in one command. It makes .venv with the pinned requirements, and
# .venv-page with the further packages of the page. The arguments are those of python -m fusion_jax.serve:
#   FUSION_API_KEY=... bash launch/serve.sh --checkpoint runs/quickstart
# EXTRAS adds extras of setup.py, such as gpu. With --page=false nothing is installed for the page.
here=$PWD
EXTRAS="serve${EXTRAS:+,$EXTRAS}" source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
source launch/page_env.sh
python=$PWD/.venv/bin/python
case " $* " in
*" --page="[fF0nN]* | *" --nopage "*) ;;
*)
  # shellcheck disable=SC2119 # no packages beside the page's
  if page_environment; then
    python=$PWD/.venv-page/bin/python
  else
    echo "warning: requirements-page.txt could not be installed; there is no web page." >&2
  fi
  ;;
esac
cd "$here"
exec "$python" -m fusion_jax.serve "$@"

# Sourced by the other scripts: makes .venv with the pinned requirements and puts it on the PATH.
# PYTHON chooses the interpreter; EXTRAS (for example "test") adds extras of setup.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

find_python() {
  local candidate
  for candidate in ${PYTHON:-} python3.12 python3.11 python3 python; do
    # A name on the PATH may be a stub that does not run, so this asks for its version.
    if "$candidate" -c 'import sys, venv; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  echo "error: no Python 3.11 or 3.12 with the venv module found; install one or set PYTHON=/path/to/python." >&2
  return 1
}

if [ ! -x .venv/bin/python ]; then
  python="$(find_python)"
  echo "making .venv with $("$python" --version)"
  "$python" -m venv .venv
fi
stamp=".venv/installed-$(cat requirements.txt setup.py | cksum | cut -d' ' -f1)-${EXTRAS:-}"
if [ ! -e "$stamp" ]; then
  echo "installing requirements (a minute or two) ..."
  .venv/bin/python -m pip install --quiet --no-compile --disable-pip-version-check -r requirements.txt
  .venv/bin/python -m pip install --quiet --no-compile --disable-pip-version-check --no-build-isolation -e ".${EXTRAS:+[$EXTRAS]}" 2>/dev/null ||
    .venv/bin/python -m pip install --quiet --no-compile --disable-pip-version-check -e ".${EXTRAS:+[$EXTRAS]}"
  touch "$stamp"
fi
export PATH="$PWD/.venv/bin:$PATH"

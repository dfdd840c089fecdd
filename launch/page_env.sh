# Sourced after env.sh by the scripts that need the web page. page_environment makes .venv-page, which has its own
# packages in front of all of .venv, because Gradio needs an older Pillow than requirements.txt pins.
# Arguments: pinned packages to install beside requirements-page.txt. It fails if something cannot be installed.
page_environment() {
  local stamp package
  stamp=".venv-page/installed-$(cat requirements-page.txt requirements.txt setup.py | cksum | cut -d' ' -f1)"
  if [ ! -e "$stamp" ]; then
    echo "installing requirements-page.txt ..."
    rm -rf .venv-page
    python -m venv .venv-page || return
    python -c 'import sysconfig; print("import site; site.addsitedir(" + repr(sysconfig.get_path("purelib")) + ")")' \
      >"$(.venv-page/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/venv.pth" || return
    page_install -r requirements-page.txt || return
    touch "$stamp"
  fi
  for package in "$@"; do
    [ -e "$stamp-$package" ] || page_install "$package" || return
    touch "$stamp-$package"
  done
}

page_install() {
  .venv-page/bin/python -m pip install --quiet --no-compile --disable-pip-version-check "$@"
}

# Sourced by the scripts beside it: enter the project's root and its virtual environment, made and filled if need be.
# usage: . scripts/environment.sh EXTRA
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
environment=${LAYERZERO_VENV:-.venv}
stamp="$environment/.installed-$1"
if [ ! -f "$stamp" ] || [ pyproject.toml -nt "$stamp" ] || [ scripts/constraints.txt -nt "$stamp" ]; then
  echo "== installing into $environment"
  [ -x "$environment/bin/python" ] || "${PYTHON:-python3}" -m venv "$environment"
  "$environment/bin/python" -m pip install -q --disable-pip-version-check -c scripts/constraints.txt setuptools
  "$environment/bin/python" -m pip install -q --disable-pip-version-check --no-build-isolation \
    -c scripts/constraints.txt -e ".[$1]"
  touch "$stamp"
fi
export PATH="$(cd "$environment" && pwd)/bin:$PATH"

#!/usr/bin/env bash
# All checks: format, lint, types, tests by two processes (-n 0: by one). Arguments go to pytest.
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh" dev
ruff format --check .
ruff check .
mypy
pytest -n 2 --dist loadfile "$@"

#!/usr/bin/env bash
# All checks: format, lint, types, tests. Arguments go to pytest.
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh" dev
ruff format --check .
ruff check .
mypy
pytest "$@"

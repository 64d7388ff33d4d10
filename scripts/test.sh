#!/usr/bin/env bash
# All checks: format, lint, types, tests by two processes (-n 0: by one). Arguments go to pytest.
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh" dev
ruff format --check .
ruff check .
mypy
# A thread of torch that waits lets the other process have its core; spinning, both would wait for each other.
OMP_WAIT_POLICY=PASSIVE pytest -n 2 --dist loadfile "$@"

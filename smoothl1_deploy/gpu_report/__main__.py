"""`python -m smoothl1_deploy.gpu_report`."""

from .command import main

if __name__ == "__main__":  # the matrix's worker processes import this module too
    raise SystemExit(main())

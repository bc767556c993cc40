"""``aer export-ledger`` from a checkout: the same arguments."""

import sys

from aer_megatron.report.ledger_csv import main

if __name__ == "__main__":
    sys.exit(main())

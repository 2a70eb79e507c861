"""``python -m monai_deqkan``, the same as ``monai-deqkan``."""

import sys

from monai_deqkan.cli import main

if __name__ == "__main__":
    sys.exit(main())

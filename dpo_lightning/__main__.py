"""``python -m dpo_lightning``, the same as the command ``dpo-lightning``."""

from dpo_lightning.cli import main

if __name__ == "__main__":
    main()

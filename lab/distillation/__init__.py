"""`starling distil`: trains the LoRA adapter of ``--star-adapter``."""

"""Where replies, images, verdicts and scores come from; `base.py` says what each must offer."""

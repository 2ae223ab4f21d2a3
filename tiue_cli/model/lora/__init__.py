"""LoRA adapters: found and checked (``files``), brought into one form (``layers``), put on a model (``adapters``)."""

"""Integrations with PEFT and transformers, which are imported only on use."""

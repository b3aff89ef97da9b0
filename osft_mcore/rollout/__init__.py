"""Sampling answers: the engine protocol and vLLM behind it. vLLM is imported only here."""

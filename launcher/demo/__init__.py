"""The built-in model and its data, which `launcher fit` trains without a config.

Nothing else imports it, but by its class path.
"""

"""The built-in model and its data, which `launcher fit` trains without a config.

Other packages use it only by its class path.
"""

"""Small programs of ordinary users, run under plain Lightning and under the launcher, and compared."""

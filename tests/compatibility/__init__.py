"""Small user programs, run under plain Lightning and under the launcher, and compared."""

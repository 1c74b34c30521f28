"""The programs behind the speed figures of README."""

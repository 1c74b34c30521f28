"""The programs behind the speed figures of docs/speed.md."""

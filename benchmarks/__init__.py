"""Programs that measure the speed figures of docs/speed.md."""

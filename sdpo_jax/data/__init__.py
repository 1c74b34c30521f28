"""Raw interactions -> sequences -> windows -> candidates -> prompts."""

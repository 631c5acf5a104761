"""The engine on vLLM.

- `engine`: what is the same wherever vLLM runs
- `local`: a model loaded in this process; `arguments`: its settings
- `server`: a server that runs already
- `pieces`: what these share
"""

"""Random requests, steps and faults on vLLM's real scheduler with Starling's subclass, without a model.

``machine.py`` has the rules, ``cases.py`` the requests, ``runner.py`` the model runner, ``checks.py`` what must hold
after each rule, and ``setup.py`` the schedulers.
"""

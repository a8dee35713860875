"""Other people's Pyro programs, distilled as they are: `python -m tests.third_party` says how to install and run them."""

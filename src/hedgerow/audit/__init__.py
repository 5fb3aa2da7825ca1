"""Audits of runs: what left each client, and what can be guessed of its rows from the model.

found         an audit as audit.json has it
examining     an audit of a run
lower_bound   ε that an audit of one run shows, from guesses on canaries
membership    how well a score tells members from others
exposure      how far a model prefers a canary to others like it
words         an audit in sentences and tables
"""

"""Differential privacy: accounts of what was spent, and noise that nobody else can take away.

accounting      ε of Gaussian mechanisms, and the least noise for a budget
noise           Gaussian noise from a secret key
client_level    means of clients' bounded updates, with noise that the server adds
example_level   a client's steps along sums of bounded gradients, with noise that its site adds
"""

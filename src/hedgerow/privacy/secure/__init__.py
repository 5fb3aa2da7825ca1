"""Secure sums: a server learns the sum of clients' numbers, and of none of them alone.

Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning", CCS 2017
(eprint 2017/281), figure 2 without its consistency check, against a server that follows the
protocol and up to t - 1 clients that tell it all they know:

    keys      client u:  two X25519 key pairs: one to encrypt shares, one to agree on masks
    shares    client u:  b_u at random; shares of b_u and of its masks' key, any t of which restore
                         it, each encrypted for one client, and a digest of each for the server
    masked    client u:  y_u = x_u + PRG(b_u) + Σ_{v > u} PRG(s_uv) - Σ_{v < u} PRG(s_uv)  mod 2^b
    unmasking client u:  shares of b_v of those whose y_v arrived, of the keys of all others
    server:   Σ x_u = Σ y_u - Σ PRG(b_u) ± Σ PRG(s_uv)                                  mod 2^b

x_u are fixed-point codes, s_uv is what the keys of u and v agree on, PRG is ChaCha20. Masks cancel
in pairs, whatever the x_u are; a client that is gone after its shares takes no part in the sum.
Digests are not in the paper: by them a client that deals shares that nobody can use, or hands on
wrong ones, is found out and done without. One that shares another secret than it masks with ends
the sum all the same.
"""

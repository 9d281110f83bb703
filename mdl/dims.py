"""The letter legend: a tensor with two or more dims carries them as a suffix (`x_BTD`), einsum strings use the same letters.

Lower case marks the local shard inside `shard_map` (`x_btD`: rows and positions local, model dim whole).

    A  gradient-accumulation steps    B  batch (rows)             T  query positions       S  key positions
    D  model                          F  feed-forward             V  vocabulary            L  layers
    N  heads                          Z  key-value heads          K  query-key head dim (H + R)
    H  non-rotary head dim            R  rotary head dim          U  value head dim
    Q  query latent                   C  key-value latent         E  experts               G  expert groups
    X  experts per token              M  routed rows (tokens x X, sorted by expert)
    I  indexer heads                  J  indexer head dim         W  selected keys
    P  cache pages                    Y  rows per page
    O  devices that own experts
"""

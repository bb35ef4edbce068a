"""Letters used in every signature and comment; nothing here runs.

B  sequences in a batch          H  KV heads            D  head_dim of keys (and of values unless said)
T  tokens of a sequence          G  queries per KV head (query heads = H * G)
Q  new tokens of a call          P  pages               Z  width of a codec's own basis

Units are part of names: `page_tokens`, `code_bits`, `row_bytes`, `wait_ms`. `folded` counts tokens that live in pages,
`length` counts all tokens of a sequence.
"""

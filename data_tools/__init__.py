"""Programs that turn text into token shards and check them. They use megarat's shard format and tokenizers, and nothing else of it."""

"""Text as token shards: their format, the tokenizers, the order of the samples and the loader that turns them into batches."""

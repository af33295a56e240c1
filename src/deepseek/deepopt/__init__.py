"""DeepOpt: token shards -> checkpoint."""

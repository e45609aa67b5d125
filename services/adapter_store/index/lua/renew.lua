-- Begins a new epoch unless another did. KEYS: meta, feed. ARGV: the epoch that ends, the new one
if redis.call('HGET', KEYS[1], 'epoch') == ARGV[1] then
  redis.call('HSET', KEYS[1], 'epoch', ARGV[2])
  redis.call('UNLINK', KEYS[2])
end
return 1

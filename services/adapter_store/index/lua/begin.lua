-- Makes an empty index unless there is one; returns its meta.
-- KEYS: meta and all other kept keys. ARGV: schema, epoch, incarnation
-- What is left without meta, as after an eviction, is no index: it goes.
if redis.call('EXISTS', KEYS[1]) == 0 then
  redis.call('UNLINK', unpack(KEYS))
  redis.call('HSET', KEYS[1], 'schema', ARGV[1], 'epoch', ARGV[2], 'revision', 0, 'incarnation', ARGV[3])
end
return redis.call('HMGET', KEYS[1], 'schema', 'epoch', 'revision', 'incarnation')

-- Applies a stream's next entry: the revision it got, or nil unless `seq` is next, or a word: why it cannot be applied.
-- KEYS: meta, states, seqs, names, named, documents, packs, feed, totals, lease
-- ARGV: schema, token, lease ms, feed length, stream, name, seq, live, state, change, documents n, n x (key, document), packs…
-- name: '' of a base model. token: '' but for a rebuild, which writes to keys of its own while it holds the lease.
local meta, states, seqs, names, named, documents, packs, feed, totals, lease = unpack(KEYS)
local schema, token, lease_ms, feed_length, stream, name = unpack(ARGV, 1, 6)
local seq, live = tonumber(ARGV[7]), tonumber(ARGV[8])

local holder = redis.call('GET', lease) or ''
if holder ~= token then
  return token == '' and 'rebuilding' or 'expired'
end
local found = redis.call('HGET', meta, 'schema')
if not found then
  return 'lost'
elseif found ~= schema then
  return 'schema'
end

local before = redis.call('HGET', seqs, stream) or '0 0'
local old_seq, old_live = string.match(before, '^(%d+) (%d+)$')
old_live = tonumber(old_live)
if seq ~= tonumber(old_seq) + 1 then
  return false
end

redis.call('HSET', states, stream, seq .. ' ' .. ARGV[9])
redis.call('HSET', seqs, stream, seq .. ' ' .. live)
if seq == 1 then
  redis.call('ZADD', names, 0, stream)
  if name == '' then
    redis.call('HINCRBY', totals, 'base_models', 1)
  else
    redis.call('ZADD', named, 0, name .. '/' .. stream)
  end
end
if (live > 0) ~= (old_live > 0) then
  redis.call('HINCRBY', totals, 'adapters', live > 0 and 1 or -1)
end
if live ~= old_live then
  redis.call('HINCRBY', totals, 'versions', live - old_live)
end
local last = 11 + 2 * tonumber(ARGV[11])
for at = 12, last, 2 do
  redis.call('HSET', documents, stream .. '/' .. ARGV[at], ARGV[at + 1])
end
for at = last + 1, #ARGV do
  redis.call('SADD', packs, ARGV[at])
end
local revision = redis.call('HINCRBY', meta, 'revision', 1)
redis.call('XADD', feed, 'MAXLEN', '=', feed_length, revision .. '-0', 'stream', stream, 'change', ARGV[10])

if token ~= '' then -- of a rebuild that dies, nothing stays
  for at = 1, #KEYS do
    redis.call('PEXPIRE', KEYS[at], lease_ms)
  end
end
return revision

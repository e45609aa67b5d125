-- A page of streams by name, with their states, as of one moment: meta, then stream and state in turn.
-- KEYS: meta, names, states. ARGV: min, max (as ZRANGEBYLEX has them), limit
local answer = {redis.call('HMGET', KEYS[1], 'schema', 'epoch', 'revision', 'incarnation')}
for _, stream in ipairs(redis.call('ZRANGEBYLEX', KEYS[2], ARGV[1], ARGV[2], 'LIMIT', 0, ARGV[3])) do
  answer[#answer + 1] = stream
  answer[#answer + 1] = redis.call('HGET', KEYS[3], stream)
end
return answer

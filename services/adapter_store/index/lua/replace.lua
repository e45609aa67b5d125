-- Ends a rebuild: what it wrote takes the place of what there was, at once. 0: the lease is another's by now.
-- KEYS: the kept keys, as many written ones in the same order, lease. ARGV: token
local kept = (#KEYS - 1) / 2
if redis.call('GET', KEYS[#KEYS]) ~= ARGV[1] or redis.call('EXISTS', KEYS[kept + 1]) == 0 then
  return 0
end
for at = 1, kept do
  redis.call('UNLINK', KEYS[at]) -- RENAME would free the old value before it answers
  if redis.call('EXISTS', KEYS[kept + at]) == 1 then
    redis.call('RENAME', KEYS[kept + at], KEYS[at])
    redis.call('PERSIST', KEYS[at])
  end
end
redis.call('UNLINK', KEYS[#KEYS])
return 1

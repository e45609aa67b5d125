-- Ends a rebuild that failed. KEYS: the written keys, lease. ARGV: token
if redis.call('GET', KEYS[#KEYS]) == ARGV[1] then
  redis.call('UNLINK', unpack(KEYS))
end
return 1

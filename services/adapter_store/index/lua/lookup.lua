-- A stream's state, and the documents that an alias or a version most likely means by it, as of one moment: meta, state
-- (or nothing), then key and document in turn. What the alias means is the caller's to say: documents never change, so
-- one too many or too few costs bytes or a round trip, and nothing else.
-- KEYS: meta, states, documents. ARGV: stream, alias or version
local answer = {
  redis.call('HMGET', KEYS[1], 'schema', 'epoch', 'revision', 'incarnation'),
  redis.call('HGET', KEYS[2], ARGV[1]),
}
local state = answer[2]
if not state then
  return answer
end
local versions = string.match(ARGV[2], '^%d+$') and '[' .. ARGV[2] .. ',' or ''
local _, last = string.find(state, '"' .. ARGV[2] .. '":[[', 1, true)
if last then
  versions = string.match(state, '%b[]', last - 1) or ''
end
for version in string.gmatch(versions, '%[(%d+),') do
  local document = redis.call('HGET', KEYS[3], ARGV[1] .. '/' .. version)
  if document then
    answer[#answer + 1] = version
    answer[#answer + 1] = document
  end
end
return answer

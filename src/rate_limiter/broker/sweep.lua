-- Moves jobs of some tasks from the front of a queue to the end of a lane. All others stay where they are.
--
-- KEYS: the list of the queue, the list of the lane. kombu adds at the left, and takes at the right.
-- ARGV: how many messages to look at, and the names of the tasks. A job with an ETA stays: it does not wait for tokens
-- yet. Returns how many were moved.

local tasks = {}
for i = 2, #ARGV do
  tasks[ARGV[i]] = true
end

local messages = redis.call("LRANGE", KEYS[1], -ARGV[1], -1)
local stay, go = {}, {}
for i = 1, #messages do
  local read, message = pcall(cjson.decode, messages[i])
  local headers = read and type(message) == "table" and message.headers
  if type(headers) == "table" and tasks[headers.task] and (headers.eta == nil or headers.eta == cjson.null) then
    table.insert(go, 1, messages[i])  -- the oldest first
  else
    stay[#stay + 1] = messages[i]
  end
end
if #go > 0 then
  redis.call("LPUSH", KEYS[2], unpack(go))  -- first: Redis may refuse it, and nothing has changed
  redis.call("LTRIM", KEYS[1], 0, -#messages - 1)
  if #stay > 0 then
    redis.call("RPUSH", KEYS[1], unpack(stay))
  end
end
return #go

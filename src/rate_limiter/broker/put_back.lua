-- Puts the newest messages of a lane in front of what waits in its queue. Called until all are back, it keeps their
-- order: the oldest comes last, and is the first to go.
--
-- KEYS: the list of the lane, the list of the queue. kombu adds at the left, and takes at the right.
-- ARGV: how many at most. Returns how many it has put back.

local messages = redis.call("LRANGE", KEYS[1], 0, ARGV[1] - 1)
if #messages > 0 then
  redis.call("RPUSH", KEYS[2], unpack(messages))
  redis.call("LTRIM", KEYS[1], #messages, -1)
end
return #messages

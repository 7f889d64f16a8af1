-- Moves one message that this worker has not acknowledged to the end of a list.
--
-- KEYS: kombu's hash of unacknowledged messages, its sorted set of their deliveries, the list.
-- ARGV: the delivery tag; the message as it is to be, or "" for the message as it came.
-- Returns 1; or 0, and changes nothing, if the message is not there: visibility_timeout has passed, and somebody
-- else has it.

local entry = redis.call("HGET", KEYS[1], ARGV[1])
if not entry then
  return 0
end
local message = ARGV[2]
if message == "" then
  -- An entry is a JSON list: the message, its exchange, its routing key.
  message = string.match(entry, '^%[(.*}), "[^"]*", "[^"]*"%]$')
  if not message then
    return redis.error_reply("the message in " .. KEYS[1] .. " is not as kombu writes it")
  end
end
-- This one first, for Redis may refuse it: no memory, no permission. Then nothing has changed.
redis.call("LPUSH", KEYS[3], message)
redis.call("HDEL", KEYS[1], ARGV[1])
redis.call("ZREM", KEYS[2], ARGV[1])
return 1

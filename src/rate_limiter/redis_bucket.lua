-- The buckets of redis_bucket.py. Each is one hash; a bucket without a hash is new.
--
--   l, t     the level, and the moment of it: microseconds of this server's clock, the only one that counts
--   p        no token before this moment (pause)
--   o, m     tokens that waiting callers were promised, and the most that one of them was
--   c, r     capacity and rate that an operator has set; v, the version: when; y, why; w, who
--   d, e     the capacity and the rate of the code at that time
--
-- KEYS: for each bucket its hash. Behind them: the hashes whose c and r count for a bucket that has none of its
-- own, as the keys of a BucketPerKey.
-- ARGV: the command, two numbers for it, and the number of buckets, as one text with spaces: a client takes its
-- time for each argument.
-- Then such a text for each bucket: the capacity, the rate and the first level that its caller has in the code;
-- the version that the caller knows; for "take" the tokens to give back (below 0: to charge), those that the
-- caller was promised, those that one job takes, and those for which there is to be room; and the place in KEYS of
-- the hash that counts for it too, or 0. The arguments of "configure" stand behind.
--
-- The answer is one text with spaces: what the command gives, and then for each bucket its version and its level.
-- If the caller does not know the version of one, it is a list: that text, and for each bucket a list of what
-- is stored, empty if the caller knows it.

local MICRO = 1000000
local SLACK = 1000       -- promised callers may be late by so many microseconds
local DAY = 86400        -- seconds for which a bucket that starts below its capacity is kept, once it is full
local FAR = 2 ^ 53       -- microseconds: the end of the clock, in the year 2255; no wait is longer

local clock = redis.call('TIME')
local now = clock[1] * MICRO + clock[2]
local command, first, second, count = string.match(ARGV[1], '^(%S+) (%S+) (%S+) (%S+)$')
first, second = tonumber(first), tonumber(second)

local FIELDS = '^(%S+) (%S+) (%S+) (%S+) (%S+) (%S+) (%S+) (%S+) (%S+)$'

local format = string.format
local function text(number) return number == 0 and '0' or format('%.17g', number) end
local function whole(number) return number == 0 and '0' or format('%.0f', number) end

-- Fields of a hash as numbers, false where there is none. What is no number is an error: no decision can rest on it.
local function numbers(key, ...)
  local h = redis.call('HMGET', key, ...)
  for i = 1, #h do
    if h[i] then
      local field, number = select(i, ...), tonumber(h[i])
      local fits = number and number - number == 0 and (field ~= 'v' or math.abs(number) <= FAR)
      if not fits then error('no such number in field ' .. field .. ' of ' .. key) end
      h[i] = number
    end
  end
  return h
end

-- The i-th bucket, as its hash and the time since then make it.
local function open(i)
  local capacity, rate, initial, known, back, held, unit, room, parent = string.match(ARGV[1 + i], FIELDS)
  local key = KEYS[i]
  local b = {
    key = key, known = known, code_capacity = tonumber(capacity), code_rate = tonumber(rate),
    back = tonumber(back), held = tonumber(held), unit = tonumber(unit), room = tonumber(room),
    paused = 0, promised = 0, most = 0,
  }
  local h = numbers(key, 'l', 't', 'p', 'o', 'm', 'c', 'r', 'v')
  b.capacity, b.rate = h[6] or b.code_capacity, h[7] or b.code_rate
  b.own_version, b.stored = whole(h[8] or 0), h[8] and key
  b.version = b.own_version
  if parent ~= '0' then
    local of_all = KEYS[tonumber(parent)]
    local d = numbers(of_all, 'c', 'r', 'v')
    if d[3] then
      if not h[6] then b.capacity, b.rate, b.stored = d[1], d[2], of_all end
      b.version = b.version .. '/' .. whole(d[3])
    end
  end
  if b.capacity <= 0 or b.rate <= 0 then error('no capacity and rate for ' .. key) end
  initial = math.min(tonumber(initial), b.capacity)
  b.keep = initial < b.capacity and DAY or 1
  b.level, b.moment = initial, now
  if h[1] then
    b.level, b.paused, b.promised, b.most = h[1], h[3], h[4], h[5]
    local from = h[2]
    if from - now > MICRO then  -- the clock was set back: the level stays, and the pause stays as long as it was
      if b.paused > 0 then b.paused = b.paused - (from - now) end
      from, b.stale = now, true  -- saved even by a refusal, or it would refuse until the old moment
    end
    if from > now then b.moment = from end  -- by less than a second: time stands still
    if b.paused > from then from = b.paused end
    if now > from then b.level = b.level + (now - from) * b.rate / MICRO end
    if b.level > b.capacity then
      -- It has been full for so long: promised callers have not come.
      local idle = (b.level - b.capacity) / b.rate * MICRO - SLACK
      if b.promised > 0 and idle > 0 then b.promised = b.promised - idle * b.rate / MICRO end
      b.level = b.capacity
    end
    if b.paused <= now then b.paused = 0 end
    if b.promised <= 0 then b.promised, b.most = 0, 0 end
  elseif initial < b.capacity then
    b.stale = true
  end
  return b
end

local function save(b)
  redis.call('HSET', b.key, 'l', text(b.level), 't', whole(b.moment), 'p', whole(b.paused),
    'o', text(b.promised), 'm', text(b.most))
  if b.own_version == '0' then  -- it may go when it is full; what an operator has set stays
    local full = (b.capacity - b.level + b.promised) / b.rate
    if b.paused > now then full = full + (b.paused - now) / MICRO end
    redis.call('PEXPIRE', b.key, whole(math.min(math.ceil((full + b.keep) * 1000), FAR)))
  end
end

-- The microseconds until so many tokens, which are short now, have come.
local function after(b, short)
  local wait = 0
  if short > b.capacity * 1e-12 then wait = math.ceil(short / b.rate * MICRO) end
  if b.paused > now then wait = wait + b.paused - now end
  return math.min(wait, FAR)
end

-- What a caller is told that does not know the version: the numbers that count, and who has set them.
local function stored(b)
  local more = b.stored and redis.call('HMGET', b.stored, 'v', 'y', 'w', 'd', 'e') or {}
  return {text(b.capacity), text(b.rate), more[1] or '', more[2] or '', more[3] or '', more[4] or '', more[5] or ''}
end

-- Takes for jobs that each take from all buckets: for as many as can go now, at most `want`. What the others
-- need is promised, for at most `promise` jobs, at the bucket that makes them wait the longest.
local function take(buckets, want, promise)
  local given, wait, last, promised = 0, 0, 1, 0
  for i, b in ipairs(buckets) do
    b.level = math.min(b.paused > now and 0 or b.capacity, b.level + b.back)  -- a pause ends with an empty bucket
    b.promised = math.max(0, b.promised - b.held)
    -- What others were promised stays theirs.
    if b.room > 0 then b.level = math.min(b.level, math.max(b.promised, b.capacity - b.room)) end
    b.slack = b.capacity * 1e-12
    if b.unit > b.capacity then wait, last, want, promise = -1, i, 0, 0 end
  end

  local function goes(b)
    if b.unit == 0 then return true end
    if b.paused > now or b.level < b.unit - b.slack then return false end
    return (given + 1) * b.unit <= b.held + b.slack          -- promised before: only the level counts
      or b.level - b.promised >= b.unit - b.slack
      -- enough for this job and for the largest promise
      or (given == 0 and b.held == 0 and b.level >= b.unit + b.most - b.slack)
  end
  local function all_go()
    for _, b in ipairs(buckets) do
      if not goes(b) then return false end
    end
    return true
  end
  while given < want and all_go() do
    for _, b in ipairs(buckets) do b.level = b.level - b.unit end
    given = given + 1
  end

  if given < want then
    wait = -1
    for i, b in ipairs(buckets) do
      local keeps = promise > 0 and given == 0 and b.held >= b.unit - b.slack  -- its place
      local short = keeps and b.unit - b.level or math.max(promise, 1) * b.unit - b.level + b.promised
      local delay = after(b, short)
      if b.unit > 0 and delay > wait then
        wait, last = delay, i
        promised = keeps and b.held or promise * b.unit
      end
    end
    if promised > 0 then
      local b = buckets[last]
      b.promised, b.most = b.promised + promised, math.max(b.most, promised)
    end
  end
  for i, b in ipairs(buckets) do
    if given > 0 or b.held > 0 or b.back ~= 0 or b.room > 0 or b.stale or (promised > 0 and i == last) then save(b) end
  end
  return string.format('%d %.0f %d %.17g', given, wait, last, promised)
end

local buckets, answer = {}, '-'
for i = 1, tonumber(count) do buckets[i] = open(i) end
local b = buckets[1]

if command == 'take' then
  answer = take(buckets, first, second)
elseif command == 'look' then
  if b.stale then save(b) end
  answer = whole(math.min(math.max(0, b.paused - now), FAR))
elseif command == 'pause' then
  local till = math.min(now + first, FAR)
  if till > b.paused then
    -- It starts from empty. A debt goes on shrinking.
    b.level = math.min(0, b.level + (till - math.max(now, b.paused)) * b.rate / MICRO)
    b.paused = till
    save(b)
  end
elseif command == 'resume' then
  if b.paused > now then
    if b.level < 0 then b.level = b.level - (b.paused - now) * b.rate / MICRO end
    b.paused = 0
    save(b)
  end
elseif command == 'configure' then
  if first > 0 then b.capacity = first end
  if second > 0 then b.rate = second end
  b.level = math.min(b.level, b.capacity)
  b.own_version = whole(math.max(now, tonumber(b.own_version) + 1))
  b.version, b.stored = b.own_version, b.key
  save(b)
  redis.call('HSET', b.key, 'c', text(b.capacity), 'r', text(b.rate), 'v', b.version,
    'y', ARGV[#ARGV - 1], 'w', ARGV[#ARGV], 'd', text(b.code_capacity), 'e', text(b.code_rate))
  redis.call('PERSIST', b.key)
elseif command == 'clear' then
  b.capacity, b.rate, b.own_version, b.version, b.stored = b.code_capacity, b.code_rate, '0', '0', nil
  b.level = math.min(b.level, b.capacity)
  redis.call('HDEL', b.key, 'c', 'r', 'v', 'y', 'w', 'd', 'e')
  save(b)
end

local news, unknown = {}, false
for i, each in ipairs(buckets) do
  answer = answer .. ' ' .. each.version .. ' ' .. text(each.level)
  news[i] = {}
  if each.version ~= each.known then news[i], unknown = stored(each), true end
end
if unknown then return {answer, unpack(news)} end
return answer

-- One bucket of redis_bucket.py, in one hash. A bucket without a hash is full.
--
--   l, t     the level, and the moment of it: microseconds of this server's clock, the only one that counts
--   p        no token before this moment (pause)
--   o, m     tokens that waiting callers were promised, and the most that one of them was
--   c, r     capacity and rate that an operator has set; v, their version; y, why
--
-- KEYS[1]: the hash. ARGV: the command, the capacity and the rate of the caller, and what the command takes.
-- All answers are lists: v, capacity, rate, y, and what the command gives. Numbers go out as text: Redis would
-- cut off their fractions.

local MICRO = 1000000
local SLACK = 1000  -- promised callers may be late by so many microseconds

local clock = redis.call('TIME')
local now = clock[1] * MICRO + clock[2]
local command, code_capacity, code_rate = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])

local h = redis.call('HMGET', KEYS[1], 'l', 't', 'p', 'o', 'm', 'c', 'r', 'v', 'y')
local capacity, rate = tonumber(h[6] or code_capacity), tonumber(h[7] or code_rate)
local version, why = h[8] or '0', h[9] or ''
local level, moment, paused, promised, most, stale = capacity, now, 0, 0, 0, false

if h[1] then
  level, paused, promised, most = tonumber(h[1]), tonumber(h[3]), tonumber(h[4]), tonumber(h[5])
  local from = tonumber(h[2])
  if from - now > MICRO then  -- the clock was set back: the level stays, and the pause stays as long as it was
    if paused > 0 then paused = paused - (from - now) end
    from, stale = now, true  -- saved even by a refusal, or it would refuse until the old moment
  end
  if from > now then moment = from end  -- by less than a second: time stands still
  if paused > from then from = paused end
  if now > from then level = level + (now - from) * rate / MICRO end
  if level > capacity then
    -- It has been full for so long: promised callers have not come.
    local idle = (level - capacity) / rate * MICRO - SLACK
    if promised > 0 and idle > 0 then promised = promised - idle * rate / MICRO end
    level = capacity
  end
  if paused <= now then paused = 0 end
  if promised <= 0 then promised, most = 0, 0 end
end

local function text(number) return string.format('%.17g', number) end

local function save()
  redis.call('HSET', KEYS[1], 'l', text(level), 't', string.format('%.0f', moment),
    'p', string.format('%.0f', paused), 'o', text(promised), 'm', text(most))
  if version == '0' then  -- it may go when it is full; what an operator has set stays
    local full = (capacity - level + promised) / rate
    if paused > now then full = full + (paused - now) / MICRO end
    redis.call('PEXPIRE', KEYS[1], string.format('%.0f', math.min(math.ceil(full * 1000) + 1000, 2 ^ 53)))
  end
end

-- The microseconds until so many tokens, which are short now, have come.
local function after(short)
  local wait = 0
  if short > capacity * 1e-12 then wait = math.ceil(short / rate * MICRO) end
  if paused > now then wait = wait + paused - now end
  return wait
end

local answer = {}

if command == 'take' then
  -- back: tokens to give back; below 0: to charge. held: what this caller was promised. unit: tokens that are
  -- of use together. want: how many it wants in all. promise: how many it wants to be promised of the rest.
  local back, held = tonumber(ARGV[4]), tonumber(ARGV[5])
  local unit, want, promise = tonumber(ARGV[6]), tonumber(ARGV[7]), tonumber(ARGV[8])
  level = math.min(paused > now and 0 or capacity, level + back)  -- a pause ends with an empty bucket
  promised = math.max(0, promised - held)
  local given, wait, slack = 0, 0, capacity * 1e-12
  if unit > capacity then
    wait, promise = -1, 0
  elseif want > 0 then
    while given + unit <= want + slack and paused <= now do
      local due = given + unit <= held + slack          -- promised before: only the level counts
        or level - promised >= unit - slack
        or (given == 0 and held == 0 and level >= unit + most - slack)  -- enough for us and for the largest promise
      if not due or level < unit - slack then break end
      level, given = level - unit, given + unit
    end
    if given + unit > want + slack then
      promise = 0
    elseif promise > 0 and held >= unit - slack and given == 0 then
      wait, promise = after(unit - level), held         -- it keeps its place
    else
      wait = after(math.max(promise, unit) - level + promised)
    end
    if promise > 0 then
      promised = promised + promise
      most = math.max(most, promise)
    end
  end
  if given > 0 or promise > 0 or held > 0 or back ~= 0 or stale then save() end
  answer = {text(given), string.format('%.0f', wait), text(promise), text(level)}
elseif command == 'pause' then
  local till = now + tonumber(ARGV[4])
  if till > paused then
    -- It starts from empty. A debt goes on shrinking.
    level = math.min(0, level + (till - math.max(now, paused)) * rate / MICRO)
    paused = till
    save()
  end
elseif command == 'resume' then
  if paused > now then
    if level < 0 then level = level - (paused - now) * rate / MICRO end
    paused = 0
    save()
  end
elseif command == 'configure' then
  if ARGV[4] ~= '' then capacity = tonumber(ARGV[4]) end
  if ARGV[5] ~= '' then rate = tonumber(ARGV[5]) end
  why, level = ARGV[6], math.min(level, capacity)
  version = string.format('%.0f', math.max(now, tonumber(version) + 1))
  save()
  redis.call('HSET', KEYS[1], 'c', text(capacity), 'r', text(rate), 'v', version, 'y', why)
  redis.call('PERSIST', KEYS[1])
elseif command == 'clear' then
  capacity, rate, version, why = code_capacity, code_rate, '0', ''
  level = math.min(level, capacity)
  redis.call('HDEL', KEYS[1], 'c', 'r', 'v', 'y')
  save()
elseif command == 'look' then
  answer = {text(level), string.format('%.0f', math.max(0, paused - now))}
end

return {version, text(capacity), text(rate), why, unpack(answer)}

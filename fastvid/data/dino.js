// Drives the real game from inside chrome://dino. Injected before the page's own scripts run.
// Time, randomness and animation frames are replaced, so that a clip is a function of its seed alone.
(() => {
  const FRAME_MS = 1000 / 60;
  let now = 0;
  let state = 1;
  const random = () => {  // mulberry32
    state = (state + 0x6D2B79F5) | 0;
    let z = Math.imul(state ^ (state >>> 15), state | 1);
    z = (z + Math.imul(z ^ (z >>> 7), z | 61)) ^ z;
    return ((z ^ (z >>> 14)) >>> 0) / 4294967296;
  };
  performance.now = () => now;
  Date.now = () => now;
  Math.random = random;
  window.requestAnimationFrame = () => 0;  // the recorder calls update() itself

  const restart = (game, seed, speed) => {
    state = seed | 0;
    now = 1e6;  // sums of frame times round the same in every clip
    game.gameOver();  // it makes the panel that restart() resets
    game.activated = true;
    game.raqId = 0;
    game.invertTimer = 0;
    game.config.invertDistance = Infinity;  // night never falls, however long the clip
    game.tRex.playingIntro = false;
    game.tRex.xInitialPos = game.tRex.config.startXPos;
    game.horizon.clouds = [];
    game.horizon.cloudFrequency = 0.5;
    game.horizon.obstacleHistory = [];
    game.restart();
    game.tRex.timer = 0;
    for (const line of game.horizon.horizonLines) {  // ground that earlier clips left behind
      line.sourceXPos = line.sourceXPos.map((_, i) => line.spritePos.x + i * line.dimensions.width);
    }
    for (let i = 0; i < 3; i++) game.horizon.addCloud();
    game.runningTime = game.config.clearTime;
    game.currentSpeed = speed;
  };

  // The player: jumps when the next obstacle is a random number of frames away.
  const play = (game, plan) => {
    const rex = game.tRex;
    const next = game.horizon.obstacles.find((o) => o.xPos + o.width > rex.xPos);
    if (!next || rex.jumping) return;
    if (plan.target !== next) {
      plan.target = next;
      plan.frames = 14 + 6 * random();
    }
    if (next.xPos - rex.xPos - rex.config.width < game.currentSpeed * (plan.frames - 6)) rex.startJump(game.currentSpeed);
  };

  const tick = (game, plan) => {
    play(game, plan);
    now += FRAME_MS;
    game.update();
    return !game.crashed;
  };

  // Grey bytes of `frames` views, or null if the dinosaur hit something.
  const attempt = (seed, options) => {
    const {frames, every, x, width} = options;
    const game = Runner.getInstance();
    state = seed | 0;
    const speed = 6 + 2 * random();
    let warmUp = 40 + Math.floor(200 * random());
    restart(game, seed ^ 0x5bd1e995, speed);
    const plan = {};
    while (warmUp-- > 0) if (!tick(game, plan)) return null;
    const height = game.dimensions.height;
    const bytes = new Uint8Array(frames * height * width);
    for (let f = 0; f < frames; f++) {
      for (let i = 0; i < every; i++) if (!tick(game, plan)) return null;
      const {data} = game.canvasCtx.getImageData(x, 0, width, height);
      // a transparent canvas on the page's white
      for (let p = 0; p < height * width; p++) {
        const alpha = data[4 * p + 3] / 255;
        bytes[f * height * width + p] = Math.round(data[4 * p] * alpha + 255 * (1 - alpha));
      }
    }
    return bytes;
  };

  const base64 = (bytes) => {
    let text = '';
    for (let i = 0; i < bytes.length; i += 32768) text += String.fromCharCode(...bytes.subarray(i, i + 32768));
    return btoa(text);
  };

  window.recordDino = (seed, options) => {
    for (let i = 0; i < 50; i++) {
      const bytes = attempt((Math.imul(seed, 64) + i) | 0, options);
      if (bytes) return base64(bytes);
    }
    return '';
  };
})();

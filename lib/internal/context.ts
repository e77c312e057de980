/**
 * The context of a run. It is passed to every function that needs settings or reports something to
 * the user.
 */

/** The Square account that a run works with. */
export interface SquareSettings {
  /**
   * The name that is printed and stored: `sandbox`, `production`, or `offline`. With
   * SQUARE_BASE_URL set, it is `offline`: requests go to that server, for example the fake Square
   * server, and not to Square.
   */
  environment: string;
  token: string;
  /** For example `https://connect.squareup.com`, without a slash at the end. */
  baseUrl: string;
}

/** Counts of the requests of a run so far. The `fetch` of strict-fetch.ts updates them. */
export interface Traffic {
  requests: number;
  retries: number;
  /** Requests whose effect is unknown, for example because the reply was lost. */
  unknownOutcomes: number;
}

export interface RunContext {
  /** The name of the script, for example `pull-created`. */
  script: string;
  /** The path of the SQLite file, as the user wrote it. */
  databasePath: string;
  square: SquareSettings;
  /**
   * When the run began, in milliseconds since 1970. It is set from this computer's clock before the
   * first request. If a reply shows that Square's clock is behind, the `fetch` of strict-fetch.ts
   * moves it back to that time.
   */
  startedAt: number;
  traffic: Traffic;
  /** Prints a warning to stderr, also with --quiet. */
  warn(text: string): void;
  /**
   * Prints a detail, for example a retry, to stderr. It is printed with --verbose, and also on a
   * terminal unless --quiet is set.
   */
  note(text: string): void;
  /** Shows a progress bar on a terminal. */
  showProgress(done: number, total: number): void;
  /**
   * Builds the command that runs another script on the same file from the current working
   * directory, for example `npm run init-db`. Returns undefined if no such script exists next to
   * the running one.
   */
  commandFor(script: string, args?: string): string | undefined;
}

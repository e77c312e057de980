/**
 * Whose customers a file holds. Ids of one Square account mean nothing in another. With the token of another
 * seller, every customer of the file would be created again there, and the directories would be mixed. So the
 * file remembers its account, and every script compares it before it reads or writes anything.
 */
import { createHash } from "node:crypto";
import type { Database } from "sql.js";
import type { SquareClient } from "square";
import type { RunContext } from "./context.ts";
import { SyncError } from "./errors.ts";
import { describeSquareError } from "./square-errors.ts";

const EXPIRY_WARNING_MS = 7 * 86_400_000;

/** The row of the table square_account. */
export interface StoredAccount {
  environment: string;
  merchantId: string | null;
  /**
   * SHA-256 of the token that was checked. The token itself is never stored. A token is long and random, so
   * it cannot be found by hashing guesses, as a password could.
   */
  tokenHash: string | null;
  /** Separated by blanks, for example `CUSTOMERS_READ CUSTOMERS_WRITE`. */
  tokenScopes: string | null;
  tokenExpiresAt: string | null;
  checkedAt: string | null;
}

/**
 * Reads the account of a file; undefined in a file that holds no customers yet.
 * @throws SyncError (usage) for a file without the table: without it, nothing would keep two accounts apart
 */
export function readAccount(db: Database, path: string): StoredAccount | undefined {
  const [table] = db.exec("SELECT 1 FROM sqlite_master WHERE name = 'square_account'");
  if (table === undefined)
    throw new SyncError(
      "usage",
      `Cannot use "${path}": it has no square_account table`,
      "create the tables of lib/schema.sql in it",
    );
  const [result] = db.exec(
    `SELECT environment, merchant_id, token_hash, token_scopes, token_expires_at, checked_at
     FROM square_account`,
  );
  const row = result?.values[0];
  if (row === undefined) return undefined;
  const [environment, ...others] = row.map((value) => (value === null ? null : String(value)));
  const [merchantId = null, tokenHash = null, tokenScopes = null, expiresAt = null, at = null] =
    others;
  return {
    environment: environment ?? "",
    merchantId,
    tokenHash,
    tokenScopes,
    tokenExpiresAt: expiresAt,
    checkedAt: at,
  };
}

/**
 * Writes the account, unless the file has the same one already.
 * @throws SyncError (usage) when the file has another environment or merchant, or no table for the account
 */
export function saveAccount(db: Database, path: string, account: StoredAccount): void {
  const stored = readAccount(db, path);
  requireSameAccount(path, stored, account);
  if (JSON.stringify(stored) === JSON.stringify(account)) return;
  db.run(
    `INSERT OR REPLACE INTO square_account
       (only_row, environment, merchant_id, token_hash, token_scopes, token_expires_at, checked_at)
     VALUES (1, ?, ?, ?, ?, ?, ?)`,
    [
      account.environment,
      account.merchantId,
      account.tokenHash,
      account.tokenScopes,
      account.tokenExpiresAt,
      account.checkedAt,
    ],
  );
}

/**
 * Compares the account of a file with another one.
 * @param stored the account of the file
 * @throws SyncError (usage) when the environment or the merchant differs
 */
export function requireSameAccount(
  path: string,
  stored: StoredAccount | undefined,
  current: Pick<StoredAccount, "environment" | "merchantId">,
): void {
  if (stored === undefined) return;
  const nextStep =
    "another file with --db or DATABASE_PATH; or the token and settings that belong to this file";
  if (stored.environment !== current.environment)
    throw new SyncError(
      "usage",
      `Cannot use "${path}": it holds customers of ${describeEnvironment(stored.environment)}, and this run is for ${describeEnvironment(current.environment)}`,
      nextStep,
    );
  const { merchantId } = stored;
  if (merchantId !== null && current.merchantId !== null && merchantId !== current.merchantId)
    throw new SyncError(
      "usage",
      `Cannot use "${path}": it holds customers of the Square merchant ${merchantId}, and this token belongs to the merchant ${current.merchantId}`,
      nextStep,
    );
}

/**
 * Checks the token before the first other request of a run: whether it belongs to the merchant of the file,
 * has the scopes that the script needs, and will expire soon. A token that was checked before is not checked
 * again, so that a quiet night stays one request.
 * @param stored the account of the file
 * @param scopes the permissions that the script needs, such as `CUSTOMERS_READ`
 * @returns the account to save with the next update of the file
 * @throws SyncError (usage) for another merchant, (denied) for a rejected token or a missing scope
 * @see https://developer.squareup.com/reference/square/o-auth-api/retrieve-token-status
 */
export async function checkAccount(
  square: SquareClient,
  context: RunContext,
  stored: StoredAccount | undefined,
  scopes: readonly string[],
): Promise<StoredAccount> {
  const { environment, token } = context.square;
  const isCheckedToken = stored !== undefined && !isUncheckedToken(stored, token);
  if (
    isCheckedToken &&
    listMissing(stored.tokenScopes, scopes).length === 0 &&
    !isPast(stored.tokenExpiresAt, context.startedAt)
  ) {
    warnOfExpiry(stored, context);
    return stored;
  }

  // Without an answer, what an earlier check of this token found stays true. For another token nothing is
  // known, and the next run asks again.
  const keepStored = () => (isCheckedToken ? stored : buildUnchecked(stored, context));
  const status = await retrieveTokenStatus(square, context);
  if (status === "no answer") return keepStored();

  const account: StoredAccount = {
    environment,
    merchantId: status.merchantId || null,
    tokenHash: hashToken(token),
    tokenScopes: status.scopes?.join(" ") || null,
    tokenExpiresAt: status.expiresAt || null,
    checkedAt: new Date(context.startedAt).toISOString(),
  };
  requireSameAccount(context.databasePath, stored, account);
  const missing = listMissing(account.tokenScopes, scopes);
  if (missing.length > 0)
    throw new SyncError(
      "denied",
      `Cannot use this token: it lacks the permission${missing.length > 1 ? "s" : ""} ${missing.join(" and ")}`,
      "ask the seller for it, or use a token that has it",
    );
  warnOfExpiry(account, context);
  // The endpoint does not know the merchant, but the file has one, which must not get lost.
  return account.merchantId === null && stored?.merchantId ? keepStored() : account;
}

/**
 * True when the file belongs to a seller, and this token was not checked for it yet. It may be the token of
 * another seller.
 */
export function isUncheckedToken(stored: StoredAccount | undefined, token: string): boolean {
  return stored !== undefined && stored.tokenHash !== hashToken(token);
}

function hashToken(token: string): string {
  return createHash("sha256").update(token).digest("hex");
}

interface TokenStatus {
  merchantId?: string;
  scopes?: string[];
  expiresAt?: string;
}

/**
 * Asks RetrieveTokenStatus. Square documents it for production tokens. So an endpoint that does not answer,
 * or answers in another form, is no reason to stop: then only the environment is compared.
 * @returns an empty status when the endpoint does not exist, or does not know tokens of the sandbox. That will
 *   not change, so it counts as checked. After "no answer", the next run asks again.
 */
async function retrieveTokenStatus(
  square: SquareClient,
  context: RunContext,
): Promise<TokenStatus | "no answer"> {
  try {
    const { merchantId, scopes, expiresAt } = await square.oAuth.retrieveTokenStatus({
      maxRetries: 1,
    });
    const hasScopes = Array.isArray(scopes) && scopes.every((scope) => typeof scope === "string");
    return {
      ...(typeof merchantId === "string" && { merchantId }),
      ...(hasScopes && { scopes }),
      ...(typeof expiresAt === "string" && { expiresAt }),
    };
  } catch (error) {
    const described = describeSquareError(error, context);
    if (described === undefined) throw error;
    const isDenied = described.kind === "denied";
    // It is not documented whether Square knows sandbox tokens here. The next request will tell.
    if (isDenied && context.square.environment !== "sandbox") throw described;
    context.note(`the token could not be checked: ${described.message}`);
    const isMissing = error instanceof Error && "statusCode" in error && error.statusCode === 404;
    return isDenied || isMissing ? {} : "no answer";
  }
}

/** Builds the account of a run whose token could not be checked, and warns when the file has a seller. */
function buildUnchecked(
  stored: StoredAccount | undefined,
  { square: { environment }, warn }: RunContext,
): StoredAccount {
  const merchantId = stored?.merchantId ?? null;
  if (merchantId !== null)
    warn(
      `it could not be checked whether this token belongs to the merchant ${merchantId} of this file`,
    );
  return {
    environment,
    merchantId,
    tokenHash: null,
    tokenScopes: null,
    tokenExpiresAt: null,
    checkedAt: null,
  };
}

// A personal access token can have no list of scopes. It has all permissions, so nothing is missing.
function listMissing(granted: string | null, needed: readonly string[]): string[] {
  if (granted === null) return [];
  return needed.filter((scope) => !granted.split(" ").includes(scope));
}

function warnOfExpiry({ tokenExpiresAt }: StoredAccount, { startedAt, warn }: RunContext): void {
  if (isPast(tokenExpiresAt, startedAt + EXPIRY_WARNING_MS))
    warn(
      `the access token expires on ${tokenExpiresAt?.slice(0, 10)}: replace SQUARE_ACCESS_TOKEN before that`,
    );
}

function isPast(time: string | null, now: number): boolean {
  return time !== null && Date.parse(time) < now;
}

function describeEnvironment(name: string): string {
  if (name === "offline") return "the server of SQUARE_BASE_URL (offline)";
  return name === "sandbox" ? "the Square sandbox" : `Square ${name}`;
}

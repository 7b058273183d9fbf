import js from '@eslint/js';
import tseslint from 'typescript-eslint';

export default tseslint.config(
  { ignores: ['dist/', 'build/', 'build-*/', 'out/', 'node_modules/', 'bench/peers/node_modules/'] },
  js.configs.recommended,
  {
    files: ['**/*.ts'],
    extends: [...tseslint.configs.recommendedTypeChecked],
    languageOptions: { parserOptions: { project: './tsconfig.all.json' } },
    rules: {
      '@typescript-eslint/no-non-null-assertion': 'off', // lengths are checked, and test code may assert
      '@typescript-eslint/restrict-template-expressions': ['error', { allowNumber: true }],
    },
  },
  {
    // tests read JSON, and misuse the interface on purpose
    files: ['test/**/*.ts'],
    rules: Object.fromEntries(
      ['explicit-any', 'unsafe-argument', 'unsafe-assignment', 'unsafe-call', 'unsafe-member-access', 'unsafe-return'].map((rule) => [
        `@typescript-eslint/no-${rule}`,
        'off',
      ]),
    ),
  },
  {
    files: ['**/*.mjs', '**/*.js'],
    languageOptions: { globals: { process: 'readonly', console: 'readonly', URL: 'readonly', setTimeout: 'readonly' } },
  },
);
